/**
 * A model's calibration: a cloud of measured changes with the curve fitted through them, and for
 * each kind of part the error that reusing its last result would have made, step by step.
 */
import { h, s } from "../dom.mjs";
import { gridLines, roundStep, stretched, tickLabels } from "./axes.mjs";
import { plotTitle, section, statistics } from "./section.mjs";

const HEIGHT = 110; // pixels of a plot
const COLORS = 6; // distinct line colors in the style sheet

export function calibrationChart(chart) {
  return section(
    chart,
    statistics(chart.summary),
    chart.points?.length > 0 && changePlot(chart),
    chart.series?.length > 0 && errorPlot(chart),
  );
}

/** The change of the output over the change of the first block's input. */
function changePlot({ points, fit }) {
  return [
    plotTitle("How far the output moves", "each dot: one step of a prompt; line: the fitted curve"),
    xyPlot({
      points,
      lines: [{ xy: fit ?? [], color: 1 }],
      xLabel: "change of the first block's input",
      fromZero: true,
    }),
  ];
}

/** The error of giving each kind of part the result of the step before. */
function errorPlot({ series, series_note: note }) {
  const lines = series.map(({ name, y }, index) => ({
    name,
    color: index % COLORS,
    xy: y.map((value, step) => [step + 1, value]),
  }));
  return [
    plotTitle(
      "Error of reusing the previous step",
      note ?? "relative change of each part's output",
    ),
    xyPlot({ points: [], lines, xLabel: "step", fromZero: false }),
    h(
      "div.nibble-legend",
      lines.map(({ name, color }) => h("span", h(`span.nibble-dash.nibble-dash-${color}`), name)),
    ),
  ];
}

/** A plot with round axes; missing values break a line. */
function xyPlot({ points, lines, xLabel, fromZero }) {
  const all = [...points, ...lines.flatMap(({ xy }) => xy)].filter(
    ([x, y]) => Number.isFinite(x) && Number.isFinite(y),
  );
  if (!all.length) return null;
  const left = fromZero ? 0 : Math.min(...all.map(([across]) => across));
  const right = Math.max(...all.map(([across]) => across));
  const ticks = roundTicks(0, Math.max(...all.map(([, y]) => y)), 3);
  const top = ticks.at(-1);
  const x = (value) => (100 * (value - left)) / (right - left || 1);
  const y = (value) => HEIGHT * (1 - Math.max(0, value) / (top || 1));
  const marks = roundTicks(left, right, 5).filter((value) => value >= left && value <= right);
  const dots = points
    .filter((point) => point.every(Number.isFinite))
    .map(([across, up]) => s("circle.nibble-point", { cx: `${x(across)}%`, cy: y(up), r: 1.8 }));
  const curves = lines.map(({ xy, color }) =>
    s(`path.nibble-fit.nibble-fit-${color}`, { d: path(xy, x, y) }),
  );
  return h(
    "div.nibble-xy",
    { role: "img", "aria-label": `${points.length} measurements, ${lines.length} curves` },
    tickLabels(ticks, y, short),
    s("svg", { height: HEIGHT }, gridLines(ticks, y), dots, stretched(HEIGHT, curves)),
    h(
      "div.nibble-xy-x",
      { "aria-hidden": "true" },
      marks.map((value) => h("span", { style: `left:${x(value)}%` }, short(value))),
    ),
    h("div.nibble-xy-label", xLabel),
  );
}

function path(xy, x, y) {
  let penDown = false;
  return xy
    .map(([across, up]) => {
      if (!Number.isFinite(up)) {
        penDown = false;
        return "";
      }
      const command = penDown ? "L" : "M";
      penDown = true;
      return `${command}${x(across).toFixed(3)} ${y(up).toFixed(2)}`;
    })
    .join("");
}

/** Round numbers from at or below `low` to at or above `high`, about `count` of them. */
function roundTicks(low, high, count) {
  const step = roundStep((high - low) / count || 1);
  const first = Math.floor(low / step + 1e-9);
  const last = Math.ceil(high / step - 1e-6);
  return Array.from({ length: Math.max(last - first, 0) + 1 }, (_, i) => (first + i) * step);
}

/** 0.30000000000000004 -> "0.3". */
function short(value) {
  return String(Number(value.toPrecision(3)));
}
