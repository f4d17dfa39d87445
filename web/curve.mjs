/**
 * A training's loss over its steps: the steps as dots, their smooth mean as a line. Horizontal positions are percentages of all the steps asked for,
 * so the line grows to the right while the training runs and follows the node's width.
 */
import { h, s } from "./dom.mjs";

const HEIGHT = 132; // pixels of the loss axis
const FEW = 80; // dots up to which they are drawn larger

/** {points: [[step, loss], ...], smooth: [[step, loss], ...], steps, lowest: [step, loss] | null, phases: [[name, steps before it], ...]} -> element */
export function curvePlot({ points = [], smooth = [], steps = 1, lowest = null, phases = [] }) {
  const [dots, line] = [points, smooth].map((list) =>
    list.filter((point) => point.every(Number.isFinite)),
  );
  const axis = lossAxis(dots, line);
  const end = Math.max(steps, dots.at(-1)?.[0] ?? 1, 1);
  const x = (step) => (100 * step) / end;
  const y = (loss) =>
    HEIGHT * (1 - (Math.min(loss, axis.high) - axis.low) / (axis.high - axis.low));
  const cursor = s("g");
  const picture = s(
    "svg",
    { height: HEIGHT, role: "img", tabindex: 0, "aria-label": describe(line) },
    axis.ticks.map((loss) =>
      s("line.nibble-grid", { x1: "0%", x2: "100%", y1: y(loss), y2: y(loss) }),
    ),
    phases
      .slice(1)
      .map(([, start]) =>
        s("line.nibble-phase", { x1: `${x(start)}%`, x2: `${x(start)}%`, y1: 0, y2: HEIGHT }),
      ),
    s(
      "g",
      dots.map(([step, loss]) =>
        s("circle.nibble-raw", {
          cx: `${x(step)}%`,
          cy: y(loss),
          r: dots.length > FEW ? 1.3 : 2.2,
        }),
      ),
    ),
    s(
      "svg",
      { viewBox: `0 0 100 ${HEIGHT}`, width: "100%", height: HEIGHT, preserveAspectRatio: "none" },
      byPhase(line, phases).map(
        (part) =>
          part.length > 1 &&
          s("path.nibble-line", {
            d: `M${part.map(([step, loss]) => `${x(step)},${y(loss)}`).join("L")}`,
          }),
      ),
    ),
    lowest && s("circle.nibble-lowest", { cx: `${x(lowest[0])}%`, cy: y(lowest[1]), r: 4 }),
    cursor,
  );
  const tip = h("div.nibble-tip", { hidden: "" });
  const plot = h(
    "div.nibble-plot.nibble-curve",
    {
      style: `padding-left:${8 + 6.5 * Math.max(...axis.ticks.map((loss) => label(loss, axis).length))}px`,
    },
    axis.ticks.map((loss) =>
      h("span.nibble-tick", { style: `top:${y(loss).toFixed(1)}px` }, label(loss, axis)),
    ),
    picture,
    stepNames(end, x),
    phases.length > 1 && phaseNames(phases, end, x),
    tip,
  );
  listen(picture, dots, (index) => {
    const point = dots[index];
    tip.hidden = !point;
    cursor.replaceChildren(...(point ? marker(point, x, y) : []));
    if (point) place(tip, plot, picture, point, line[index], x(point[0]));
  });
  return plot;
}

/** The line in pieces: what is learned in one phase is another loss than in the next. */
function byPhase(line, phases) {
  if (!phases.length) return [line];
  return phases.map(([, start], i) =>
    line.filter(([step]) => step > start && step <= (phases[i + 1]?.[1] ?? Infinity)),
  );
}

/** What is learned where, under the steps. */
function phaseNames(phases, end, x) {
  return h(
    "div.nibble-groups",
    phases.map(([name, start], i) =>
      h(
        "span",
        { style: `left:${x(start)}%;width:${x(phases[i + 1]?.[1] ?? end) - x(start)}%` },
        name,
      ),
    ),
  );
}

function describe(line) {
  return line.length
    ? `Loss from ${line[0][1].toPrecision(3)} to ${line.at(-1)[1].toPrecision(3)} at step ${line.at(-1)[0]}`
    : "No step yet";
}

/** Round limits around the line and most of the dots: one wild step must not flatten all the others. */
function lossAxis(dots, line) {
  const sorted = dots.map(([, loss]) => loss).sort((a, b) => a - b);
  const values = [
    ...line.map(([, loss]) => loss),
    sorted[0],
    sorted[Math.floor(0.98 * (sorted.length - 1))],
  ].filter(Number.isFinite);
  if (!values.length) return { low: 0, high: 1, ticks: [0, 0.5, 1], step: 0.5 };
  const [least, most] = [Math.min(...values), Math.max(...values)];
  const rough = Math.max(most - least, 1e-3 * Math.abs(most), 1e-9) / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((size) => size * power >= rough);
  const low = Math.floor(least / step + 1e-9);
  const high = Math.max(Math.ceil(most / step - 1e-9), low + 1);
  return {
    low: low * step,
    high: high * step,
    step,
    ticks: Array.from({ length: high - low + 1 }, (_, i) => (low + i) * step),
  };
}

function label(loss, { step }) {
  const places = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  return places > 5 ? loss.toExponential(1) : loss.toFixed(places);
}

/** Steps under the plot: round numbers, and the last one. */
function stepNames(end, x) {
  const rough = end / 5;
  const power = 10 ** Math.floor(Math.log10(Math.max(rough, 1)));
  const size = power * [1, 2, 5, 10].find((times) => times * power >= rough);
  const steps = [];
  for (let step = size; step < end - size * 0.6; step += size) steps.push(step);
  return h(
    "div.nibble-steps",
    { "aria-hidden": "true" },
    [...steps, end].map((step) =>
      h(
        step === end ? "span.nibble-end" : "span",
        { style: step === end ? "right:0" : `left:${x(step)}%` },
        step === end ? `step ${step}` : step,
      ),
    ),
  );
}

function marker([step, loss], x, y) {
  const at = `${x(step)}%`;
  return [
    s("line.nibble-cursor", { x1: at, x2: at, y1: 0, y2: HEIGHT }),
    s("circle.nibble-halo", { cx: at, cy: y(loss), r: 4 }),
  ];
}

function place(tip, plot, picture, [step, loss], smooth, percent) {
  tip.replaceChildren(
    h("b", `Step ${step}`),
    h("div.nibble-tip-db", `loss ${loss.toPrecision(4)}`),
    smooth ? h("div", `mean ${smooth[1].toPrecision(4)}`) : "",
  );
  const at = plot.clientWidth - picture.clientWidth + (picture.clientWidth * percent) / 100;
  tip.style.left = `${Math.max(0, Math.min(at - tip.offsetWidth / 2, plot.clientWidth - tip.offsetWidth))}px`;
}

/** The pointer chooses the nearest dot, arrow keys the next. */
function listen(picture, dots, choose) {
  let current = -1;
  const take = (index) => choose((current = Math.max(0, Math.min(dots.length - 1, index))));
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const at = (event.clientX - box.left) / box.width;
    const circles = picture.querySelectorAll(".nibble-raw");
    const places = [...circles].map((circle) =>
      Math.abs(parseFloat(circle.getAttribute("cx")) / 100 - at),
    );
    if (places.length) take(places.indexOf(Math.min(...places)));
  });
  picture.addEventListener("pointerleave", () => choose(-1));
  picture.addEventListener("blur", () => choose(-1));
  picture.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || !dots.length) return;
    event.preventDefault();
    event.stopPropagation();
    take(current + step);
  });
}
