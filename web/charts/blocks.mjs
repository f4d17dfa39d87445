/**
 * A VQ calibration at work: the error of each block while it is calibrated. Every block has an
 * equal part of the width, in which its error runs from its first step to its last.
 */
import { decibels, h, s } from "../dom.mjs";
import { decibelAxis, gridLines, stretched, tickLabels, verticalLine } from "./axes.mjs";
import { centerOf, chooseItems, placeTip, shareOf } from "./pointer.mjs";
import { plotTitle, section, statistics } from "./section.mjs";

const HEIGHT = 132; // pixels of the dB axis
const GAP = 0.08; // share of a block's width that is left free at either side
const NOTE = "signal-to-error ratio of its outputs in dB, higher is better";

export function blocksChart(chart) {
  return section(
    chart,
    statistics(chart.summary),
    plotTitle("Accuracy of each block", NOTE),
    blocksPlot(chart),
  );
}

/** {blocks, rows: [{name, number, points: [[share, dB], ...]}, ...]} -> element */
function blocksPlot({ blocks = 1, rows = [] }) {
  const drawn = rows
    .map((row) => ({ ...row, points: row.points.filter((point) => point.every(Number.isFinite)) }))
    .filter((row) => row.points.length);
  const axis = decibelAxis(drawn.flatMap((row) => row.points.map(([, db]) => db)));
  const x = (row, share) =>
    (100 * (row.number + GAP + (1 - 2 * GAP) * share)) / Math.max(blocks, 1);
  const y = (db) => HEIGHT * (1 - (db - axis.low) / (axis.high - axis.low));
  const cursor = s("g");
  const picture = s(
    "svg",
    { height: HEIGHT, role: "img", tabindex: 0, "aria-label": describe(drawn, blocks) },
    gridLines(axis.ticks, y),
    stretched(
      HEIGHT,
      drawn.map((row) => curve(row, x, y)),
    ),
    drawn.map((row) => lastDot(row, x, y, blocks > 30 ? 2 : 3)),
    cursor,
  );
  const tip = h("div.nibble-tip", { hidden: "" });
  const plot = h("div.nibble-plot", tickLabels(axis.ticks, y), picture, tip);
  /** Marks a block, or none, and tells its error at the start and now. */
  const select = (row) => {
    tip.hidden = !row;
    cursor.replaceChildren(...(row ? [verticalLine("cursor", x(row, 0.5), HEIGHT)] : []));
    if (!row) return;
    tip.replaceChildren(...tipLines(row));
    placeTip(tip, plot, centerOf(plot, picture, x(row, 0.5)));
  };
  chooseItems(picture, {
    count: blocks,
    at: (event) => Math.floor(shareOf(picture, event) * blocks),
    choose: (number) => select(drawn.find((row) => row.number === number)),
    leave: () => select(null),
  });
  return plot;
}

function curve(row, x, y) {
  if (row.points.length < 2) return null;
  const d = `M${row.points.map(([share, db]) => `${x(row, share)},${y(db)}`).join("L")}`;
  return s("path.nibble-learning", { d });
}

function lastDot(row, x, y, r) {
  const [share, db] = row.points.at(-1);
  return s("circle.nibble-dot.nibble-vq", { cx: `${x(row, share)}%`, cy: y(db), r });
}

function describe(rows, blocks) {
  if (!rows.length) return "No step yet";
  const last = rows.at(-1);
  return `Block ${last.number + 1} of ${blocks}, ${last.name}: ${decibels(last.points.at(-1)[1])}`;
}

function tipLines(row) {
  const [from, to] = [row.points[0][1], row.points.at(-1)[1]];
  return [h("b", row.name), h("div.nibble-tip-db", `${decibels(from)} \u2192 ${decibels(to)}`)];
}
