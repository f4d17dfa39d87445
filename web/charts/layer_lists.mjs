/**
 * The lists below the layer plot: the least accurate layers, the least used codebooks, and what was
 * kept in 16 bits and why.
 */
import { bytes, decibels, groupBy, h, sum } from "../dom.mjs";
import { details } from "./section.mjs";

const WORST = 6; // layers in the list of the least accurate ones, and of the least used codebooks
const bytesAfter = (rows) => sum(rows, (row) => row.bytes_after);

/**
 * The layers that lost most, the first ones to keep in 16 bits; null where few were measured.
 * select(row | null) moves the plot's cursor.
 */
export function leastAccurate(rows, select) {
  const measured = rows.filter((row) => Number.isFinite(row.db));
  if (measured.length <= WORST) return null;
  const worst = [...measured].sort((a, b) => a.db - b.db).slice(0, WORST);
  const best = Math.max(...measured.map((row) => row.db));
  return details(
    "Least accurate layers",
    `lowest ${decibels(worst[0].db)}`,
    bars(worst, select, (row) => ({
      action: row.action,
      width: Math.max(0, (100 * row.db) / best),
      value: decibels(row.db),
    })),
  );
}

/** The layers whose indices carry the least of their bits; null without any codebook. */
export function leastUsedCodebooks(rows, select) {
  const share = ({ use }) => use.entropy / use.bits;
  const least = rows
    .filter((row) => row.use)
    .sort((a, b) => share(a) - share(b))
    .slice(0, WORST);
  if (!least.length) return null;
  return details(
    "Least used codebooks",
    "entropy of an index, of its bits",
    bars(least, select, (row) => ({
      action: "vq",
      width: 100 * share(row),
      value: `${row.use.entropy.toFixed(2)} / ${row.use.bits}`,
      title: `${row.use.used} of ${row.use.codewords} codewords used`,
    })),
  );
}

/** A line a layer: name, bar and value; pointing at it selects the layer. */
function bars(rows, select, show) {
  const lines = rows.map((row) => {
    const { action, width, value, title } = show(row);
    const line = h(
      "div",
      title ? { title } : null,
      h("span.nibble-name", row.name),
      h("span.nibble-bar", h(`span.nibble-${action}`, { style: `width:${width}%` })),
      h("span.nibble-value", value),
    );
    line.addEventListener("pointerenter", () => select(row));
    line.addEventListener("pointerleave", () => select(null));
    return line;
  });
  return h("div.nibble-hard", lines);
}

/** The layers left as they were, grouped by the reason, numbered blocks folded into one line. */
export function keptLayers(rows) {
  const kept = rows.filter((row) => row.action === "keep");
  if (!kept.length) return null;
  const reasons = [...groupBy(kept, (row) => row.why || "No reason recorded")];
  const line = ({ name, part }) => h("li", h("span", name), h("span", bytes(bytesAfter(part))));
  return details(
    "Kept in 16 bits",
    `${kept.length} of ${rows.length} layers, ${bytes(bytesAfter(kept))}`,
    reasons.map(([why, group]) =>
      h("div.nibble-why", h("div", why), h("ul", foldNames(group).map(line))),
    ),
  );
}

/** "blocks.0.mod.lin" ... "blocks.18.mod.lin" -> "blocks.0-18.mod.lin". */
function foldNames(rows) {
  return [...groupBy(rows, (row) => row.name.replace(/\d+/, "#"))].map(([pattern, part]) => {
    const numbers = part.map((row) => Number(row.name.match(/\d+/)?.[0])).sort((a, b) => a - b);
    return { name: part.length > 1 ? pattern.replace("#", ranges(numbers)) : part[0].name, part };
  });
}

/** [0, 1, 2, 5] -> "0-2,5". */
function ranges(numbers) {
  const spans = [];
  for (const number of numbers) {
    if (spans.length && number === spans.at(-1)[1] + 1) spans.at(-1)[1] = number;
    else spans.push([number, number]);
  }
  return spans.map(([from, to]) => (from === to ? from : `${from}-${to}`)).join(",");
}
