/**
 * The layer plot: one lollipop a layer, the numbered blocks in order and then the rest. Height is signal to quantization noise in dB,
 * colour is what was done. Horizontal positions are percentages, so the plot follows the node's width without being drawn again.
 */
import { bytes, decibels, duration, h, median, s } from "./dom.mjs";

export const ACTIONS = { w4a4: "4-bit", w4a16: "4-bit weights", vq: "codewords", keep: "16-bit" };
const HEIGHT = 132; // pixels of the dB axis
const STRIP = 5; // pixels of the colour strip under it
const MEASURED = (row) => Number.isFinite(row.db);

/** rows -> element; element.select(row | null) moves the cursor from outside. */
export function layerPlot(unordered) {
  const rows = [...unordered].sort(byPlace);
  const measured = rows.filter(MEASURED);
  const axis = dbAxis(measured.map((row) => row.db));
  const x = (index) => ((index + 0.5) / rows.length) * 100;
  const y = (db) => HEIGHT * (1 - (db - axis.low) / (axis.high - axis.low));
  const cursor = s("g");
  const picture = s(
    "svg",
    { height: HEIGHT + STRIP + 3, role: "img", tabindex: 0, "aria-label": describe(measured) },
    gridLines(axis, y),
    groupRules(rows),
    medianLine(measured, y),
    lollipops(rows, x, y),
    strip(rows),
    cursor,
  );
  const tip = h("div.nibble-tip", { hidden: "" });
  const plot = h(
    "div.nibble-plot",
    axis.ticks.map((db) => h("span.nibble-tick", { style: `top:${y(db).toFixed(1)}px` }, db)),
    picture,
    groupNames(rows),
    tip,
  );
  plot.select = (row) => {
    const index = rows.indexOf(row);
    cursor.replaceChildren(...(index < 0 ? [] : marker(row, x(index), y)));
    tip.hidden = index < 0;
    if (index >= 0) placeTip(tip, plot, picture, row, x(index));
  };
  listen(picture, rows, plot.select);
  return plot;
}

/** Files list "blocks.10" before "blocks.2"; here blocks count up, and what is in no block follows. */
function byPlace(a, b) {
  const [first, second] = [a, b].map((row) => /^[^.]+\.\d+\./.test(row.name));
  return second - first || a.name.localeCompare(b.name, "en", { numeric: true });
}

function describe(measured) {
  if (!measured.length) return "No layer was measured";
  const db = measured.map((row) => row.db);
  return `Signal to quantization noise of ${db.length} layers: median ${decibels(median(db))}, lowest ${decibels(Math.min(...db))}`;
}

/** Round limits and at most six ticks around the measured values. */
export function dbAxis(values) {
  if (!values.length) return { low: 0, high: 30, ticks: [0, 10, 20, 30] };
  const [least, most] = [Math.min(...values), Math.max(...values)];
  const step = [1, 2, 5, 10, 20, 50].find((size) => (most - least) / size <= 4) ?? 100;
  const low = Math.floor((least - step * 0.25) / step) * step;
  const high = Math.max(Math.ceil((most + step * 0.1) / step) * step, low + step);
  const ticks = [];
  for (let db = low; db <= high; db += step) ticks.push(db);
  return { low, high, ticks };
}

function gridLines(axis, y) {
  return axis.ticks.map((db) =>
    s("line.nibble-grid", { x1: "0%", x2: "100%", y1: y(db), y2: y(db) }),
  );
}

function medianLine(measured, y) {
  if (measured.length < 3) return null;
  const level = y(median(measured.map((row) => row.db)));
  return s("line.nibble-median", { x1: "0%", x2: "100%", y1: level, y2: level });
}

/** Few layers get stems and full dots; hundreds get finer dots and fainter stems, so that the plot stays a plot. */
function lollipops(rows, x, y) {
  const radius = rows.length <= 60 ? 3.5 : rows.length <= 160 ? 2.5 : 1.8;
  const width = rows.length <= 60 ? 2 : rows.length <= 160 ? 1.25 : 0.6;
  const stems = s("g");
  const dots = s("g");
  rows.forEach((row, index) => {
    if (!MEASURED(row)) return;
    const at = `${x(index).toFixed(3)}%`;
    stems.append(
      s(`line.nibble-stem.nibble-${row.action}`, {
        x1: at,
        x2: at,
        y1: HEIGHT,
        y2: y(row.db),
        "stroke-width": width,
      }),
    );
    dots.append(s(`circle.nibble-dot.nibble-${row.action}`, { cx: at, cy: y(row.db), r: radius }));
  });
  return [stems, dots];
}

/** Runs of one action as one cell each: layers without a number (kept ones) are seen here. */
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

/** The model's large parts (layers whose names begin alike); the many small ones at its ends stay unnamed. */
function parts(rows) {
  return runs(rows, (row) => row.name.split(".")[0]).filter(
    ({ from, to }) => (to - from) / rows.length > 0.14,
  );
}

function groupRules(rows) {
  const edges = new Set(
    parts(rows)
      .flatMap(({ from, to }) => [from, to])
      .filter((edge) => edge > 0 && edge < rows.length),
  );
  return [...edges].map((edge) => {
    const at = `${(edge / rows.length) * 100}%`;
    return s("line.nibble-group-rule", { x1: at, x2: at, y1: 0, y2: HEIGHT });
  });
}

function groupNames(rows) {
  return h(
    "div.nibble-groups",
    { "aria-hidden": "true" },
    parts(rows).map(({ key, from, to }) =>
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

function runs(rows, key) {
  const found = [];
  rows.forEach((row, index) => {
    const name = key(row);
    if (found.length && found.at(-1).key === name) found.at(-1).to = index + 1;
    else found.push({ key: name, from: index, to: index + 1 });
  });
  return found;
}

function marker(row, percent, y) {
  const at = `${percent}%`;
  const line = s("line.nibble-cursor", { x1: at, x2: at, y1: 0, y2: HEIGHT + STRIP + 3 });
  return MEASURED(row) ? [line, s("circle.nibble-halo", { cx: at, cy: y(row.db), r: 5 })] : [line];
}

/** Fills the tip and puts it above the plot, over the cursor as far as the width allows. */
function placeTip(tip, plot, picture, row, percent) {
  tip.replaceChildren(
    h("b", row.name),
    MEASURED(row) ? h("div.nibble-tip-db", decibels(row.db)) : "",
    h(
      "div",
      row.action === "keep" && row.why
        ? row.why
        : [ACTIONS[row.action] ?? row.action, row.why].filter(Boolean).join(": "),
    ),
    h(
      "div",
      `${bytes(row.bytes_before)} \u2192 ${bytes(row.bytes_after)}`,
      row.seconds > 0 ? `, ${duration(row.seconds)}` : "",
    ),
  );
  const left = plot.clientWidth - picture.clientWidth;
  const at = left + (picture.clientWidth * percent) / 100;
  tip.style.left = `${Math.max(0, Math.min(at - tip.offsetWidth / 2, plot.clientWidth - tip.offsetWidth))}px`;
}

/** Pointer and arrow keys choose a layer. The rectangle is measured on screen, so the canvas zoom does not matter. */
function listen(picture, rows, select) {
  let current = -1;
  const choose = (index) => {
    current = Math.max(0, Math.min(rows.length - 1, index));
    select(rows[current]);
  };
  const leave = () => select(null);
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    choose(Math.floor(((event.clientX - box.left) / box.width) * rows.length));
  });
  picture.addEventListener("pointerleave", leave);
  picture.addEventListener("blur", leave);
  picture.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    event.stopPropagation();
    choose(current + step);
  });
}
