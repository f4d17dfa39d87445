/** What FEATHER kept: pictures with pruned patches darkened, and the tokens of each layer. */
import { h, s } from "../dom.mjs";
import { plotTitle, section, statistics } from "./section.mjs";

const VEIL = [0.82, 0.55]; // opacity over patches pruned by the first and by the second stage
const HEIGHT = 56; // of the bars, in units of the drawing
const UNITS = ["", "k", "M", "G", "T", "P"];

export function patchesChart(chart) {
  return section(chart, plots(chart), statistics(chart.summary));
}

/** Pictures, then tokens by layer, then operations before and after. */
function plots({ pictures, stages, tokens, flops }) {
  const [before, after] = flops;
  const fewer = Math.round(100 * (1 - after / before));
  return h(
    "div",
    h(
      "div.nibble-pictures",
      pictures.map((one) => picture(one, stages)),
    ),
    h(
      "div.nibble-legend",
      swatch(VEIL[0], "pruned first"),
      swatch(VEIL[1], "pruned second"),
      swatch(0, "kept"),
    ),
    plotTitle("Tokens in each layer", `${tokens[0]} → ${tokens.at(-1)}`),
    bars(tokens),
    plotTitle(
      "Operations of the language model",
      `${operations(before)} → ${operations(after)}, ${fewer} % fewer`,
    ),
    h("div.nibble-bar", h("span", { style: `width:${(100 * after) / before}%` })),
  );
}

function swatch(veil, text) {
  return h("span", h("span.nibble-swatch.nibble-patch", { style: `--veil:${100 * veil}%` }), text);
}

/** One picture under a raster of veils; `last` is the stage of the patches that were kept. */
function picture({ rows, columns, url, stage }, last) {
  const kept = stage.filter((level) => level >= last).length;
  return h(
    "div.nibble-picture",
    h("img", { src: url, alt: "" }),
    s(
      "svg",
      {
        viewBox: `0 0 ${columns} ${rows}`,
        preserveAspectRatio: "none",
        role: "img",
        "aria-label": `${kept} of ${stage.length} patches kept`,
      },
      Array.from({ length: rows }, (_, y) =>
        rowVeils(stage.slice(y * columns, (y + 1) * columns), y, last),
      ).flat(),
    ),
  );
}

/** The veils of one row of patches: neighbors of the same stage are one rectangle. */
function rowVeils(levels, y, last) {
  const veils = [];
  for (let x = 0; x < levels.length;) {
    let end = x + 1;
    while (end < levels.length && levels[end] === levels[x]) end += 1;
    const opacity = VEIL[levels[x]] ?? VEIL.at(-1);
    if (levels[x] < last)
      veils.push(s("rect.nibble-veil", { x, y, width: end - x, height: 1, opacity }));
    x = end;
  }
  return veils;
}

function bars(tokens) {
  const most = Math.max(...tokens);
  return s(
    "svg.nibble-layers-left",
    {
      viewBox: `0 0 ${tokens.length} ${HEIGHT}`,
      preserveAspectRatio: "none",
      role: "img",
      "aria-label": tokens.join(", "),
    },
    tokens.map((count, i) =>
      s(
        "rect.nibble-cell",
        {
          x: i + 0.06,
          y: HEIGHT * (1 - count / most),
          width: 0.88,
          height: (HEIGHT * count) / most,
        },
        s("title", `layer ${i}: ${count} tokens`),
      ),
    ),
  );
}

/** 6.2e12 -> "6.20 TFLOP". */
function operations(count) {
  let unit = 0;
  while (count >= 999.5 && unit < UNITS.length - 1) {
    count /= 1000;
    unit += 1;
  }
  return `${count.toPrecision(3)} ${UNITS[unit]}FLOP`;
}
