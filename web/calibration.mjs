/**
 * The plots of a calibration: a cloud of measured changes with the curve fitted through them, and for each kind of part the error that
 * reusing its last result would have made, step by step.
 */
import { h, s } from "./dom.mjs";

const HEIGHT = 110; // pixels of a plot
const COLOURS = 6; // distinct line colours in the style sheet

/** chart JSON of kind "calibration" -> elements under its statistics. */
export function calibrationPlots(chart) {
  const found = [];
  if (chart.points?.length) {
    found.push(
      title("How far the output moves", "each dot: one step of a prompt; line: the fitted curve"),
      xyPlot({
        points: chart.points,
        lines: [{ xy: chart.fit ?? [], colour: 1 }],
        xLabel: "change of the first block's input",
        fromZero: true,
      }),
    );
  }
  if (chart.series?.length) {
    const lines = chart.series.map(({ name, y }, index) => ({
      name,
      colour: index % COLOURS,
      xy: y.map((value, step) => [step + 1, value]),
    }));
    found.push(
      title(
        "Error of reusing the previous step",
        chart.series_note ?? "relative change of each part's output",
      ),
      xyPlot({ points: [], lines, xLabel: "step", fromZero: false }),
      h(
        "div.nibble-legend",
        lines.map(({ name, colour }) =>
          h("span", h(`span.nibble-dash.nibble-dash-${colour}`), name),
        ),
      ),
    );
  }
  return found;
}

function title(text, note) {
  return h("div.nibble-plot-title", h("span", text), h("span.nibble-note", note));
}

/** A plot with round axes; missing values break a line. */
function xyPlot({ points, lines, xLabel, fromZero }) {
  const all = [...points, ...lines.flatMap(({ xy }) => xy)].filter(
    ([x, y]) => Number.isFinite(x) && Number.isFinite(y),
  );
  if (!all.length) return null;
  const [left, right] = [
    fromZero ? 0 : Math.min(...all.map(([x]) => x)),
    Math.max(...all.map(([x]) => x)),
  ];
  const ticks = roundTicks(0, Math.max(...all.map(([, y]) => y)), 3);
  const top = ticks.at(-1);
  const x = (value) => (100 * (value - left)) / (right - left || 1);
  const y = (value) => HEIGHT * (1 - Math.max(0, value) / (top || 1));
  const marks = roundTicks(left, right, 5).filter((value) => value >= left && value <= right);
  return h(
    "div.nibble-xy",
    { role: "img", "aria-label": `${points.length} measurements, ${lines.length} curves` },
    ticks.map((value) => h("span.nibble-tick", { style: `top:${y(value)}px` }, short(value))),
    s(
      "svg",
      { height: HEIGHT },
      ticks.map((value) =>
        s("line.nibble-grid", { x1: "0%", x2: "100%", y1: y(value), y2: y(value) }),
      ),
      points
        .filter((point) => point.every(Number.isFinite))
        .map((point) =>
          s("circle.nibble-point", { cx: `${x(point[0])}%`, cy: y(point[1]), r: 1.8 }),
        ),
      s(
        "svg",
        {
          width: "100%",
          height: HEIGHT,
          viewBox: `0 0 100 ${HEIGHT}`,
          preserveAspectRatio: "none",
        },
        lines.map(({ xy, colour }) =>
          s(`path.nibble-fit.nibble-fit-${colour}`, { d: path(xy, x, y) }),
        ),
      ),
    ),
    h(
      "div.nibble-xy-x",
      { "aria-hidden": "true" },
      marks.map((value) => h("span", { style: `left:${x(value)}%` }, short(value))),
    ),
    h("div.nibble-xy-label", xLabel),
  );
}

function path(xy, x, y) {
  let drawing = false;
  return xy
    .map(([across, up]) => {
      if (!Number.isFinite(up)) {
        drawing = false;
        return "";
      }
      const command = drawing ? "L" : "M";
      drawing = true;
      return `${command}${x(across).toFixed(3)} ${y(up).toFixed(2)}`;
    })
    .join("");
}

/** Round numbers from at or below `low` to at or above `high`, about `count` of them. */
function roundTicks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
  const ticks = [];
  for (
    let index = Math.floor(low / step + 1e-9);
    (index - 1) * step < high - step * 1e-6;
    index += 1
  )
    ticks.push(index * step);
  return ticks;
}

/** 0.30000000000000004 -> "0.3". */
function short(value) {
  return String(Number(value.toPrecision(3)));
}
