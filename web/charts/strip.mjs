/**
 * A sampling run with a cache: one cell per step, filled where the model was computed and hollow
 * where its last result was reused, and above the cells the change that has built up since the last
 * computed step, with the threshold that it must not reach. Positions are shares of the width, so
 * the strip follows the node without being drawn again; while sampling it has cells still to come.
 */
import { h, s } from "../dom.mjs";
import { chooseItems, placeTip, shareOf } from "./pointer.mjs";
import { section, statistics } from "./section.mjs";

const HEIGHT = 64; // pixels of the plot of the change
const HEADROOM = 1.3; // the plot goes up to this many thresholds; what lies higher is cut off
const FINE = 60; // cells from which they are drawn without an outline
const GAPS = [
  { upTo: 36, pixels: 2 },
  { upTo: FINE, pixels: 1 },
  { upTo: Infinity, pixels: 0.5 },
];
const WHY = {
  first: "one of the first steps, always computed",
  last: "one of the last steps, always computed",
  outside: "outside start and end",
  new: "nothing to reuse yet",
  threshold: "the change reached the threshold",
  schedule: "by the schedule",
  batch: "another prompt of the batch had to be computed",
  reused: "the change is below the threshold",
};
const STATES = { true: "computed", false: "reused", null: "pending" };
const TOLD = { computed: "computed", reused: "reused", pending: "still to come" };
const stateOf = (computed) => STATES[computed ?? null];

export function stripChart(chart) {
  return section(chart, strip(chart), chart.summary?.length > 0 && statistics(chart.summary));
}

/** chart JSON -> the count of steps, the strip and its legend. */
function strip(chart) {
  const cells = chart.cells ?? [];
  const rows = chart.rows?.length ? chart.rows : null;
  const plot = cells.some((cell) => Number.isFinite(cell.change))
    ? changePlot(cells, chart.threshold)
    : null;
  const tip = h("div.nibble-tip", { hidden: "" });
  const lanes = (rows ?? [{ computed: cells.map((cell) => cell.computed) }]).flatMap((row) =>
    lane(row, cells.length),
  );
  let style = "div.nibble-strip";
  if (rows) style += ".nibble-strip-named";
  else if (!plot) style += ".nibble-strip-bare";
  const body = h(
    style,
    { role: "img", tabindex: 0, "aria-label": describe(cells) },
    plot && [plot.scale, plot.picture],
    lanes,
    h("span"),
    numbers(cells.length),
    tip,
  );
  listen(body, cells, rows, chart.threshold, tip, plot);
  return [counts(chart, cells), body, legend(chart, cells, rows, Boolean(plot))];
}

/**
 * "14 of 28 steps computed, 2.00x less work". Where parts of a step are reused, `forwards` says how
 * many whole steps the computed parts add up to.
 */
function counts(chart, cells) {
  const done = cells.filter((cell) => cell.computed !== null).length;
  const computed = chart.forwards ?? cells.filter((cell) => cell.computed).length;
  const whole = Number.isInteger(computed);
  const words = [
    whole ? "steps computed" : "steps' worth of work computed",
    done < cells.length && `${cells.length - done} to come`,
  ];
  return h(
    "div.nibble-size",
    h("span.nibble-size-after", `${whole ? computed : computed.toFixed(1)} of ${done}`),
    h("span.nibble-size-before", words.filter(Boolean).join(", ")),
    computed > 0 &&
      done > computed &&
      h("span.nibble-size-ratio", `${(done / computed).toFixed(2)}\u00d7 less work`),
  );
}

function describe(cells) {
  return cells
    .map((cell, index) =>
      cell.computed === null ? null : `${index + 1} ${stateOf(cell.computed)}`,
    )
    .filter(Boolean)
    .join(", ");
}

/** A row of cells; cells fill the width evenly, whatever their number. */
function lane(row, count) {
  const name = h("span.nibble-strip-name", row.name ? { title: row.name } : {}, row.name ?? "");
  const gap = GAPS.find(({ upTo }) => count <= upTo).pixels;
  const cells = Array.from({ length: count }, (_, index) =>
    h(`span.nibble-step.nibble-step-${stateOf(row.computed[index])}`),
  );
  return [
    name,
    h(
      count > FINE ? "div.nibble-lane.nibble-lane-fine" : "div.nibble-lane",
      { style: `gap:${gap}px` },
      cells,
    ),
  ];
}

/** Step numbers under the first, the last and a few between them. */
function numbers(count) {
  const step = [1, 2, 5, 10, 20, 50, 100].find((size) => count / size <= 8) ?? 200;
  const shown = [];
  for (let number = step; number <= count - step / 2; number += step) shown.push(number);
  if (step > 1) shown.unshift(1);
  shown.push(count);
  const place = (number) => `left:${(100 * (number - 0.5)) / count}%`;
  return h(
    "div.nibble-numbers",
    { "aria-hidden": "true" },
    [...new Set(shown)].map((number) => h("span", { style: place(number) }, number)),
  );
}

/** The change before each decision: it climbs over reused steps and drops where one is computed. */
function changePlot(cells, threshold) {
  const most = Math.max(...cells.map((cell) => cell.change ?? 0), 1e-9);
  const top = HEADROOM * (threshold > 0 ? threshold : most);
  const y = (change) => HEIGHT * (1 - Math.min(change, top) / top);
  const x = (index) => (100 * (index + 0.5)) / cells.length;
  const cursor = s("g");
  const picture = s(
    "svg.nibble-change",
    { height: HEIGHT, viewBox: `0 0 100 ${HEIGHT}`, preserveAspectRatio: "none" },
    s("line.nibble-grid", { x1: 0, x2: 100, y1: HEIGHT, y2: HEIGHT }),
    teeth(cells, x, y),
    threshold > 0 &&
      s("line.nibble-threshold", { x1: 0, x2: 100, y1: y(threshold), y2: y(threshold) }),
    cursor,
  );
  const scale = h(
    "span.nibble-strip-name.nibble-strip-scale",
    threshold > 0 &&
      h("span", { style: `top:${y(threshold)}px`, title: "threshold" }, number(threshold)),
  );
  const select = (index) => {
    const at = { x1: x(index), x2: x(index), y1: 0, y2: HEIGHT };
    cursor.replaceChildren(...(index < 0 ? [] : [s("line.nibble-cursor", at)]));
  };
  return { picture: h("div", picture), scale, select };
}

/** The saw-tooth as an area and its upper edge. */
function teeth(cells, x, y) {
  const runs = [];
  let points = null;
  cells.forEach((cell, index) => {
    if (!Number.isFinite(cell.change)) {
      points = cell.computed ? [[x(index), HEIGHT]] : null;
      if (points) runs.push(points);
      return;
    }
    if (!points) runs.push((points = [[x(index), HEIGHT]]));
    points.push([x(index), y(cell.change)]);
    if (cell.computed) runs.push((points = [[x(index), HEIGHT]]));
  });
  const line = (run) =>
    run
      .map(([left, height], index) => `${index ? "L" : "M"}${left.toFixed(3)} ${height.toFixed(2)}`)
      .join("");
  const drawn = runs.filter((run) => run.length > 1);
  return [
    s("path.nibble-area", {
      d: drawn.map((run) => `${line(run)}L${run.at(-1)[0].toFixed(3)} ${HEIGHT}Z`).join(""),
    }),
    s("path.nibble-teeth", { d: drawn.map(line).join("") }),
  ];
}

function legend(chart, cells, rows, changes) {
  const states = rows ? rows.flatMap((row) => row.computed) : cells.map((cell) => cell.computed);
  const count = (computed) => states.filter((state) => state === computed).length;
  const threshold = chart.threshold;
  return h(
    "div.nibble-legend",
    h("span", h("span.nibble-swatch.nibble-step-computed"), "computed ", h("span", count(true))),
    h("span", h("span.nibble-swatch.nibble-step-reused"), "reused ", h("span", count(false))),
    changes &&
      h("span", h("span.nibble-dash.nibble-dash-change"), chart.measure ?? "accumulated change"),
    changes &&
      threshold > 0 &&
      h(
        "span",
        h("span.nibble-dash.nibble-dash-threshold"),
        "threshold ",
        h("span", number(threshold)),
      ),
  );
}

/** 0.4 -> "0.4", 0.01234 -> "0.0123". */
function number(value) {
  return String(Number(value.toPrecision(3)));
}

/** Lets the pointer and the arrow keys choose a step. */
function listen(body, cells, rows, threshold, tip, plot) {
  const lanes = [...body.querySelectorAll(".nibble-lane")];
  const mark = (chosen) =>
    lanes.forEach((lane) =>
      [...lane.children].forEach((cell, index) =>
        cell.classList.toggle("nibble-step-chosen", index === chosen),
      ),
    );
  chooseItems(body, {
    count: cells.length,
    at: (event) => {
      const share = shareOf(lanes[0], event);
      return share >= 0 && cells.length ? Math.floor(share * cells.length) : null;
    },
    choose: (index) => {
      tip.replaceChildren(...tipLines(cells[index], index, rows, threshold));
      tip.hidden = false;
      plot?.select(index);
      const { offsetLeft, clientWidth } = lanes[0];
      placeTip(tip, body, offsetLeft + (clientWidth * (index + 0.5)) / cells.length);
      mark(index);
    },
    leave: () => {
      tip.hidden = true;
      plot?.select(-1);
      mark(null);
    },
  });
}

/** The lines of a step's tip. */
function tipLines(cell, index, rows, threshold) {
  const lines = [h("b", `Step ${index + 1}: ${TOLD[stateOf(cell.computed)]}`)];
  if (tellsWhy(cell)) lines.push(h("div", WHY[cell.why]));
  if (Number.isFinite(cell.change)) {
    const limit = threshold > 0 ? ` of ${number(threshold)}` : "";
    lines.push(h("div.nibble-tip-db", `change ${number(cell.change)}`, limit));
  }
  if (rows) lines.push(h("div", reusedNames(rows, index)));
  if (Number.isFinite(cell.sigma)) lines.push(h("div", `noise level \u03c3 ${number(cell.sigma)}`));
  return lines;
}

/** A reason is told for a step that was decided; "by the schedule" goes without saying in reuse. */
function tellsWhy({ computed, why }) {
  const isScheduledReuse = computed === false && why === "schedule";
  return computed !== null && WHY[why] && !isScheduledReuse;
}

function reusedNames(rows, index) {
  const names = rows.filter((row) => row.computed[index] === false).map((row) => row.name);
  return names.length ? `reused: ${names.join(", ")}` : "every part computed";
}
