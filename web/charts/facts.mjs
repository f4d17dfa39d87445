/**
 * What a loader reports: rows of label and value, with a bar for a value "A of B" and a scale for
 * "good: ..."; details are folded away.
 */
import { h } from "../dom.mjs";
import { details, scale, section } from "./section.mjs";

const SIZE = String.raw`([\d.]+) ?(k|M|G|T)?i?B`;
const PART = new RegExp(`^(?:about )?${SIZE} of ${SIZE}\\b`);
const SENTENCE = 60; // characters; a longer value stands under its label, to be read as a text
const SCALE = { k: 1e3, M: 1e6, G: 1e9, T: 1e12 };

export function factsChart(chart) {
  const folded = chart.details ?? [];
  return section(
    chart,
    rows(chart.summary ?? []),
    folded.length > 0 &&
      details("Details", folded.map(([label]) => label).join(", "), rows(folded)),
  );
}

function rows(facts) {
  return h("dl.nibble-facts", facts.map(row));
}

function row([label, value]) {
  const bar = meter(label, value);
  if (bar) return bar;
  const grades = scale(value);
  const isText = !grades && String(value).length > SENTENCE;
  return h(isText ? "div.nibble-text" : "div", h("dt", label), h("dd", grades ?? value));
}

/** A bar for a value such as "about 6.9 GB of 8.0 GB, ..."; null for anything else. */
function meter(label, value) {
  const match = PART.exec(String(value));
  if (!match) return null;
  const [, part, partUnit, whole, wholeUnit] = match;
  const share = (Number(part) * (SCALE[partUnit] ?? 1)) / (Number(whole) * (SCALE[wholeUnit] ?? 1));
  if (!Number.isFinite(share)) return null;
  const bar = share > 1 ? "span.nibble-over" : "span";
  return h(
    "div.nibble-meter",
    h("div", h("dt", label), h("dd", value)),
    h("div.nibble-bar", h(bar, { style: `width:${Math.min(100, 100 * share)}%` })),
  );
}
