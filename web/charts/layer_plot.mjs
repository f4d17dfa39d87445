/**
 * The layer plot: one lollipop per layer, the numbered blocks in order and then the rest. Height is
 * the signal-to-quantization-noise ratio in dB, color is what was done. Horizontal positions are
 * percentages, so the plot follows the node's width without being drawn again.
 */
import { bytes, decibels, duration, h, median, s } from "../dom.mjs";
import { decibelAxis, gridLines, tickLabels, verticalLine } from "./axes.mjs";
import { centerOf, chooseItems, placeTip, shareOf } from "./pointer.mjs";
import { ACTIONS } from "./section.mjs";

const HEIGHT = 132; // pixels of the dB axis
const STRIP = 5; // pixels of the color strip under it
const GROUP = 0.14; // share of the layers from which a group is worth a name
const DOTS = [
  { upTo: 60, radius: 3.5, stem: 2 },
  { upTo: 160, radius: 2.5, stem: 1.25 },
  { upTo: Infinity, radius: 1.8, stem: 0.6 },
];
const isMeasured = (row) => Number.isFinite(row.db);

/** rows -> element; element.select(row | null) moves the cursor from outside. */
export function layerPlot(unordered) {
  const rows = [...unordered].sort(byPlace);
  const measured = rows.filter(isMeasured);
  const axis = decibelAxis(measured.map((row) => row.db));
  const x = (index) => ((index + 0.5) / rows.length) * 100;
  const y = (db) => HEIGHT * (1 - (db - axis.low) / (axis.high - axis.low));
  const cursor = s("g");
  const picture = s(
    "svg",
    { height: HEIGHT + STRIP + 3, role: "img", tabindex: 0, "aria-label": describe(measured) },
    gridLines(axis.ticks, y),
    groupRules(rows),
    medianLine(measured, y),
    lollipops(rows, x, y),
    strip(rows),
    cursor,
  );
  const tip = h("div.nibble-tip", { hidden: "" });
  const plot = h("div.nibble-plot", tickLabels(axis.ticks, y), picture, groupNames(rows), tip);
  plot.select = (row) => {
    const index = rows.indexOf(row);
    cursor.replaceChildren(...(index < 0 ? [] : marker(row, x(index), y)));
    tip.hidden = index < 0;
    if (index < 0) return;
    tip.replaceChildren(...tipLines(row));
    placeTip(tip, plot, centerOf(plot, picture, x(index)));
  };
  chooseItems(picture, {
    count: rows.length,
    at: (event) => Math.floor(shareOf(picture, event) * rows.length),
    choose: (index) => plot.select(rows[index]),
    leave: () => plot.select(null),
  });
  return plot;
}

/** Files list "blocks.10" before "blocks.2"; here blocks count up, and the other layers follow. */
function byPlace(a, b) {
  const [first, second] = [a, b].map((row) => /^[^.]+\.\d+\./.test(row.name));
  return second - first || a.name.localeCompare(b.name, "en", { numeric: true });
}

function describe(measured) {
  if (!measured.length) return "No layer was measured";
  const db = measured.map((row) => row.db);
  const [middle, lowest] = [median(db), Math.min(...db)].map(decibels);
  return `Signal-to-noise ratio of ${db.length} layers: median ${middle}, lowest ${lowest}`;
}

function medianLine(measured, y) {
  if (measured.length < 3) return null;
  const level = y(median(measured.map((row) => row.db)));
  return s("line.nibble-median", { x1: "0%", x2: "100%", y1: level, y2: level });
}

/** The more layers, the finer the dots and stems, so that hundreds of them stay a plot. */
function lollipops(rows, x, y) {
  const { radius, stem } = DOTS.find(({ upTo }) => rows.length <= upTo);
  const stems = s("g");
  const dots = s("g");
  rows.forEach((row, index) => {
    if (!isMeasured(row)) return;
    const at = `${x(index).toFixed(3)}%`;
    stems.append(
      s(`line.nibble-stem.nibble-${row.action}`, {
        x1: at,
        x2: at,
        y1: HEIGHT,
        y2: y(row.db),
        "stroke-width": stem,
      }),
    );
    dots.append(s(`circle.nibble-dot.nibble-${row.action}`, { cx: at, cy: y(row.db), r: radius }));
  });
  return [stems, dots];
}

/** A cell for each run of layers with the same action: layers without a dot are seen here. */
function strip(rows) {
  return runs(rows, (row) => row.action).map(({ key, from, to }) =>
    s(`rect.nibble-cell.nibble-${key}`, {
      x: `${(from / rows.length) * 100}%`,
      width: `${((to - from) / rows.length) * 100}%`,
      y: HEIGHT + 3,
      height: STRIP,
    }),
  );
}

/** The large groups of layers, by the first part of their names; small ones stay unnamed. */
function groups(rows) {
  return runs(rows, (row) => row.name.split(".")[0]).filter(
    ({ from, to }) => (to - from) / rows.length > GROUP,
  );
}

function groupRules(rows) {
  const edges = new Set(
    groups(rows)
      .flatMap(({ from, to }) => [from, to])
      .filter((edge) => edge > 0 && edge < rows.length),
  );
  return [...edges].map((edge) => verticalLine("group-rule", (edge / rows.length) * 100, HEIGHT));
}

function groupNames(rows) {
  return h(
    "div.nibble-groups",
    { "aria-hidden": "true" },
    groups(rows).map(({ key, from, to }) =>
      h(
        "span",
        {
          style: `left:${(from / rows.length) * 100}%;width:${((to - from) / rows.length) * 100}%`,
          title: key,
        },
        key.replaceAll("_", " "),
      ),
    ),
  );
}

/** Neighboring rows with the same key as one {key, from, to}; `to` is not included. */
function runs(rows, key) {
  const list = [];
  rows.forEach((row, index) => {
    const name = key(row);
    if (list.length && list.at(-1).key === name) list.at(-1).to = index + 1;
    else list.push({ key: name, from: index, to: index + 1 });
  });
  return list;
}

function marker(row, percent, y) {
  const line = verticalLine("cursor", percent, HEIGHT + STRIP + 3);
  if (!isMeasured(row)) return [line];
  return [line, s("circle.nibble-halo", { cx: `${percent}%`, cy: y(row.db), r: 5 })];
}

/** The lines of a layer's tip. */
function tipLines(row) {
  const action = ACTIONS[row.action] ?? row.action;
  const why = row.action === "keep" && row.why ? [row.why] : [action, row.why];
  return [
    h("b", row.name),
    isMeasured(row) ? h("div.nibble-tip-db", decibels(row.db)) : "",
    h("div", why.filter(Boolean).join(": ")),
    h(
      "div",
      `${bytes(row.bytes_before)} \u2192 ${bytes(row.bytes_after)}`,
      row.seconds > 0 ? `, ${duration(row.seconds)}` : "",
    ),
  ];
}
