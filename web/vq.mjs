/**
 * What the VQ nodes draw besides the layer plot: the error of each block while it is calibrated, and how much of its codebook a layer uses.
 * In the plot of a calibration every block has an equal part of the width, in which its error runs from its first step to its last.
 */
import { decibels, h, s } from "./dom.mjs";
import { dbAxis } from "./plot.mjs";

const HEIGHT = 132; // pixels of the dB axis
const LEAST_USED = 6; // layers in the list of codebooks

/** {blocks, rows: [{name, number, points: [[share, dB], ...]}, ...]} -> element */
export function blocksPlot({ blocks = 1, rows = [] }) {
  const drawn = rows
    .map((row) => ({ ...row, points: row.points.filter((point) => point.every(Number.isFinite)) }))
    .filter((row) => row.points.length);
  const axis = dbAxis(drawn.flatMap((row) => row.points.map(([, db]) => db)));
  const x = (row, share) => (100 * (row.number + 0.08 + 0.84 * share)) / Math.max(blocks, 1);
  const y = (db) => HEIGHT * (1 - (db - axis.low) / (axis.high - axis.low));
  const cursor = s("g");
  const picture = s(
    "svg",
    { height: HEIGHT, role: "img", "aria-label": describe(drawn, blocks) },
    axis.ticks.map((db) => s("line.nibble-grid", { x1: "0%", x2: "100%", y1: y(db), y2: y(db) })),
    s(
      "svg",
      { viewBox: `0 0 100 ${HEIGHT}`, width: "100%", height: HEIGHT, preserveAspectRatio: "none" },
      drawn
        .filter(({ points }) => points.length > 1)
        .map((row) =>
          s("path.nibble-learning", {
            d: `M${row.points.map(([share, db]) => `${x(row, share)},${y(db)}`).join("L")}`,
          }),
        ),
    ),
    drawn.map((row) =>
      s("circle.nibble-dot.nibble-vq", {
        cx: `${x(row, row.points.at(-1)[0])}%`,
        cy: y(row.points.at(-1)[1]),
        r: blocks > 30 ? 2 : 3,
      }),
    ),
    cursor,
  );
  const tip = h("div.nibble-tip", { hidden: "" });
  const plot = h(
    "div.nibble-plot",
    axis.ticks.map((db) => h("span.nibble-tick", { style: `top:${y(db).toFixed(1)}px` }, db)),
    picture,
    tip,
  );
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const number = Math.floor(((event.clientX - box.left) / box.width) * blocks);
    point(
      drawn.find((row) => row.number === number),
      { tip, cursor, plot, picture, x },
    );
  });
  picture.addEventListener("pointerleave", () => point(null, { tip, cursor }));
  return plot;
}

function describe(rows, blocks) {
  const last = rows.at(-1);
  return last
    ? `Block ${last.number + 1} of ${blocks}, ${last.name}: ${decibels(last.points.at(-1)[1])}`
    : "No step yet";
}

/** Marks a block and tells its error at the start and now. */
function point(row, { tip, cursor, plot, picture, x }) {
  tip.hidden = !row;
  cursor.replaceChildren();
  if (!row) return;
  const [from, to] = [row.points[0][1], row.points.at(-1)[1]];
  const at = x(row, 0.5);
  cursor.append(s("line.nibble-cursor", { x1: `${at}%`, x2: `${at}%`, y1: 0, y2: HEIGHT }));
  tip.replaceChildren(
    h("b", row.name),
    h("div.nibble-tip-db", `${decibels(from)} \u2192 ${decibels(to)}`),
  );
  const left =
    plot.clientWidth - picture.clientWidth + (picture.clientWidth * at) / 100 - tip.offsetWidth / 2;
  tip.style.left = `${Math.max(0, Math.min(left, plot.clientWidth - tip.offsetWidth))}px`;
}

/** The layers whose indices carry least of their bits; select(row | null) moves the plot's cursor. Null without any. */
export function usedCodebooks(rows, select) {
  const share = ({ use }) => use.entropy / use.bits;
  const least = rows
    .filter((row) => row.use)
    .sort((a, b) => share(a) - share(b))
    .slice(0, LEAST_USED);
  if (!least.length) return null;
  const lines = least.map((row) => {
    const bar = h("span.nibble-vq", { style: `width:${100 * share(row)}%` });
    const line = h(
      "div",
      { title: `${row.use.used} of ${row.use.codewords} codewords used` },
      h("span.nibble-name", row.name),
      h("span.nibble-bar", bar),
      h("span.nibble-value", `${row.use.entropy.toFixed(2)} / ${row.use.bits}`),
    );
    line.addEventListener("pointerenter", () => select(row));
    line.addEventListener("pointerleave", () => select(null));
    return line;
  });
  return h(
    "details.nibble-details",
    h("summary", "Least used codebooks ", h("span", "entropy of the indices, of their bits")),
    h("div.nibble-hard", lines),
  );
}
