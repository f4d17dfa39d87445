/**
 * A training's loss over its steps: the steps as dots, their smooth mean as a line. Horizontal
 * positions are percentages of all the steps asked for, so the line grows to the right while the
 * training runs and follows the node's width.
 */
import { h, s } from "../dom.mjs";
import { gridLines, roundStep, stretched, tickLabels, verticalLine } from "./axes.mjs";
import { centerOf, chooseItems, placeTip, shareOf } from "./pointer.mjs";
import { plotTitle, section, statistics } from "./section.mjs";

const HEIGHT = 132; // pixels of the loss axis
const FEW = 80; // dots up to which they are drawn larger
const NOTE = "dots: steps; line: their mean; ring: its lowest point";

export function lossChart(chart) {
  return section(
    chart,
    statistics(chart.summary),
    chart.points?.length > 0 && [plotTitle("Loss", NOTE), lossPlot(chart)],
  );
}

/**
 * {points: [[step, loss], ...], smooth: [[step, loss], ...], steps, lowest: [step, loss] | null,
 *  phases: [[name, steps before it], ...]} -> element
 */
function lossPlot({ points = [], smooth = [], steps = 1, lowest = null, phases = [] }) {
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
    gridLines(axis.ticks, y),
    phases.slice(1).map(([, start]) => verticalLine("phase", x(start), HEIGHT)),
    stepDots(dots, x, y),
    stretched(
      HEIGHT,
      byPhase(line, phases).map((part) => meanLine(part, x, y)),
    ),
    lowest && s("circle.nibble-lowest", { cx: `${x(lowest[0])}%`, cy: y(lowest[1]), r: 4 }),
    cursor,
  );
  const tip = h("div.nibble-tip", { hidden: "" });
  const label = (loss) => lossLabel(loss, axis.step);
  const room = 8 + 6.5 * Math.max(...axis.ticks.map((loss) => label(loss).length));
  const plot = h(
    "div.nibble-plot.nibble-curve",
    { style: `padding-left:${room}px` },
    tickLabels(axis.ticks, y, label),
    picture,
    stepNames(end, x),
    phases.length > 1 && phaseNames(phases, end, x),
    tip,
  );
  const select = (index) => {
    const dot = dots[index];
    tip.hidden = !dot;
    cursor.replaceChildren(...(dot ? marker(dot, x, y) : []));
    if (!dot) return;
    tip.replaceChildren(...tipLines(dot, line[index]));
    placeTip(tip, plot, centerOf(plot, picture, x(dot[0])));
  };
  chooseItems(picture, {
    count: dots.length,
    at: (event) => nearest(dots, 100 * shareOf(picture, event), x),
    choose: select,
    leave: () => select(-1),
  });
  return plot;
}

function stepDots(dots, x, y) {
  const r = dots.length > FEW ? 1.3 : 2.2;
  return s(
    "g",
    dots.map(([step, loss]) => s("circle.nibble-raw", { cx: `${x(step)}%`, cy: y(loss), r })),
  );
}

function meanLine(part, x, y) {
  if (part.length < 2) return null;
  const d = `M${part.map(([step, loss]) => `${x(step)},${y(loss)}`).join("L")}`;
  return s("path.nibble-line", { d });
}

/** The line in pieces: one phase learns by another loss than the next. */
function byPhase(line, phases) {
  if (!phases.length) return [line];
  return phases.map(([, start], i) =>
    line.filter(([step]) => step > start && step <= (phases[i + 1]?.[1] ?? Infinity)),
  );
}

/** What is learned in each phase, under the steps. */
function phaseNames(phases, end, x) {
  const place = (start, next) => `left:${x(start)}%;width:${x(next) - x(start)}%`;
  return h(
    "div.nibble-groups",
    phases.map(([name, start], i) =>
      h("span", { style: place(start, phases[i + 1]?.[1] ?? end) }, name),
    ),
  );
}

function describe(line) {
  if (!line.length) return "No step yet";
  const [first, last] = [line[0], line.at(-1)];
  return `Loss from ${first[1].toPrecision(3)} to ${last[1].toPrecision(3)} at step ${last[0]}`;
}

/** Round limits around the line and 98 % of the dots: one wild step must not flatten the others. */
function lossAxis(dots, line) {
  const sorted = dots.map(([, loss]) => loss).sort((a, b) => a - b);
  const values = [
    ...line.map(([, loss]) => loss),
    sorted[0],
    sorted[Math.floor(0.98 * (sorted.length - 1))],
  ].filter(Number.isFinite);
  if (!values.length) return { low: 0, high: 1, ticks: [0, 0.5, 1], step: 0.5 };
  const [least, most] = [Math.min(...values), Math.max(...values)];
  const step = roundStep(Math.max(most - least, 1e-3 * Math.abs(most), 1e-9) / 4);
  const low = Math.floor(least / step + 1e-9);
  const high = Math.max(Math.ceil(most / step - 1e-9), low + 1);
  const ticks = Array.from({ length: high - low + 1 }, (_, i) => (low + i) * step);
  return { low: low * step, high: high * step, step, ticks };
}

/** A loss with as many places as the axis' steps need. */
function lossLabel(loss, step) {
  const places = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  return places > 5 ? loss.toExponential(1) : loss.toFixed(places);
}

/** Steps under the plot: round numbers, and the last one. */
function stepNames(end, x) {
  const size = roundStep(Math.max(end / 5, 1));
  const names = [];
  for (let step = size; step < end - size * 0.6; step += size)
    names.push(h("span", { style: `left:${x(step)}%` }, step));
  names.push(h("span.nibble-end", { style: "right:0" }, `step ${end}`));
  return h("div.nibble-steps", { "aria-hidden": "true" }, names);
}

function marker([step, loss], x, y) {
  return [
    verticalLine("cursor", x(step), HEIGHT),
    s("circle.nibble-halo", { cx: `${x(step)}%`, cy: y(loss), r: 4 }),
  ];
}

function tipLines([step, loss], smooth) {
  return [
    h("b", `Step ${step}`),
    h("div.nibble-tip-db", `loss ${loss.toPrecision(4)}`),
    smooth ? h("div", `mean ${smooth[1].toPrecision(4)}`) : "",
  ];
}

/** The dot nearest to a horizontal position in per cent, or null without any. */
function nearest(dots, percent, x) {
  if (!dots.length) return null;
  const distances = dots.map(([step]) => Math.abs(x(step) - percent));
  return distances.indexOf(Math.min(...distances));
}
