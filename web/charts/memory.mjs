/**
 * The memory plan: a bar for each stage, as long as the card is large, of the weights that are
 * loaded and of what computing takes; a line of RAM; and the switches, those that are on first.
 */
import { bytes, h, sum } from "../dom.mjs";
import { legend, plotTitle, section, statistics } from "./section.mjs";

const KINDS = {
  weights: { swatch: "w4a4", label: "weights" },
  work: { swatch: "w4a16", label: "computing" },
  stays: { swatch: "stays", label: "stays while there is room" },
  program: { swatch: "keep", label: "the program" },
};
const STAGES = {
  encode: "Encode the prompt",
  sample: "Sample",
  decode: "Decode",
};
const size = (part) => part.bytes;
const peak = (parts) =>
  sum(
    parts.filter((part) => part.kind !== "stays"),
    size,
  );

export function memoryChart(chart) {
  const stages = chart.stages ?? [];
  const onCard = Number.isFinite(chart.card);
  const parts = stages.flatMap((stage) => (onCard ? [...stage.card, ...stage.ram] : stage.ram));
  const fullest = stages.reduce((one, other) => (peak(other.ram) > peak(one.ram) ? other : one));
  return section(
    chart,
    h("div.nibble-verdict", chart.verdict),
    onCard && [
      plotTitle("Graphics card", `${bytes(chart.card)} for ComfyUI`),
      ...stages.map((stage) => row(stage, stage.card, chart.card)),
    ],
    plotTitle("RAM", `${bytes(chart.ram)}`),
    onCard
      ? row({ name: "all stages" }, fullest.ram, chart.ram)
      : stages.map((stage) => row(stage, stage.ram, chart.ram)),
    legend(
      Object.entries(KINDS)
        .filter(([kind]) => parts.some((part) => part.kind === kind))
        .map(([, entry]) => ({ ...entry, note: "" })),
    ),
    switches(chart.switches ?? []),
    chart.summary?.length > 0 && statistics(chart.summary),
  );
}

/** A stage's name, its peak, and its bar: all of `whole` is the bar's width. */
function row(stage, parts, whole) {
  const most = peak(parts);
  const over = most > whole;
  const scale = Math.max(whole, sum(parts, size));
  const told = [
    `${bytes(most)} of ${bytes(whole)}`,
    stage.streamed > 0 && `${bytes(stage.streamed)} more come from RAM each step`,
    stage.before > most + (stage.streamed ?? 0) && `${bytes(stage.before)} without the switches`,
  ];
  return h(
    "div.nibble-meter.nibble-memory",
    h("div", h("dt", STAGES[stage.name] ?? stage.name), h("dd", told.filter(Boolean).join("; "))),
    h(
      "div.nibble-bar",
      { role: "img", "aria-label": parts.map(words).join(", ") },
      parts.map((part) =>
        h(`span.nibble-${over ? "over" : (KINDS[part.kind]?.swatch ?? "keep")}`, {
          style: `width:${(100 * part.bytes) / scale}%`,
          title: words(part),
        }),
      ),
    ),
    h("div.nibble-note", parts.map(words).join(" · ")),
  );
}

function words(part) {
  return `${part.label} ${bytes(part.bytes)}${part.kind === "stays" ? " stays" : ""}`;
}

function switches(all) {
  const sorted = [...all].sort((one, other) => other.on - one.on);
  if (!sorted.length) return null;
  return [
    plotTitle("Switches", "what each saves, and costs"),
    h(
      "ul.nibble-switches",
      sorted.map((item) =>
        h(
          item.on ? "li" : "li.nibble-off",
          h(
            "div",
            h("b", item.name),
            h("span", `${item.on ? "on" : "not needed"}, saves ${bytes(item.saves)}`),
          ),
          h("div", item.how),
          h("div", item.costs),
        ),
      ),
    ),
  ];
}
