/** The chart of FEATHER's runs: pictures whose pruned patches are dark, and how many tokens each layer works on. */
import { h, s } from "./dom.mjs";

const VEIL = [0.82, 0.55]; // how dark a patch is that the first stage pruned, that the second pruned; a kept one is clear
const HEIGHT = 56; // of the bars, in units of the drawing

/** Pictures, then tokens by layer, then operations before and after. */
export function patchesPlot(chart) {
  const [before, after] = chart.flops;
  return h(
    "div",
    h(
      "div.nibble-pictures",
      chart.pictures.map((one) => picture(one, chart.stages)),
    ),
    h(
      "div.nibble-legend",
      legend(VEIL[0], "pruned first"),
      legend(VEIL[1], "pruned second"),
      legend(0, "kept"),
    ),
    h(
      "div.nibble-plot-title",
      h("span", "Tokens in each layer"),
      h("span.nibble-note", `${chart.tokens[0]} → ${chart.tokens.at(-1)}`),
    ),
    bars(chart.tokens),
    h(
      "div.nibble-plot-title",
      h("span", "Operations of the language model"),
      h(
        "span.nibble-note",
        `${operations(before)} → ${operations(after)}, ${Math.round(100 * (1 - after / before))} % fewer`,
      ),
    ),
    h("div.nibble-bar", h("span", { style: `width:${(100 * after) / before}%` })),
  );
}

function legend(veil, text) {
  return h("span", h("span.nibble-swatch.nibble-patch", { style: `--veil:${100 * veil}%` }), text);
}

/** One picture under a raster of veils; rects of one row and one stage are joined. */
function picture({ rows, columns, url, stage }, last) {
  const veils = [];
  for (let y = 0; y < rows; y += 1) {
    for (let x = 0; x < columns;) {
      const level = stage[y * columns + x];
      let end = x + 1;
      while (end < columns && stage[y * columns + end] === level) end += 1;
      if (level < last)
        veils.push(
          s("rect.nibble-veil", {
            x,
            y,
            width: end - x,
            height: 1,
            opacity: VEIL[level] ?? VEIL.at(-1),
          }),
        );
      x = end;
    }
  }
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
      veils,
    ),
  );
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
  const units = ["", "k", "M", "G", "T", "P"];
  let unit = 0;
  while (count >= 999.5 && unit < units.length - 1) {
    count /= 1000;
    unit += 1;
  }
  return `${count.toPrecision(3)} ${units[unit]}FLOP`;
}
