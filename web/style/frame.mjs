/** What every chart has: its colors, heading, figures, bars and legends, and lists that open. */
const css = String.raw;

export const FRAME = css`
  :host {
    display: block;
    box-sizing: border-box;
    min-width: 0;
  }
  .nibble-chart {
    --nibble-ink: var(--input-text, #ddd);
    --nibble-soft: color-mix(in srgb, var(--nibble-ink) 68%, transparent);
    --nibble-rule: color-mix(in srgb, var(--nibble-ink) 13%, transparent);
    --nibble-w4a4: #3584d4;
    --nibble-w4a16: #cf7f16;
    --nibble-vq: #1f9d7a;
    --nibble-keep: #85909c;
    --nibble-bad: #d9534f;
    container-type: inline-size;
    position: relative;
    box-sizing: border-box;
    padding: 12px;
    border-radius: 8px;
    background: color-mix(in srgb, var(--bg-color, #202020) 50%, transparent);
    box-shadow: inset 0 0 0 1px var(--nibble-rule);
    color: var(--nibble-ink);
    font:
      12px/1.4 Inter,
      system-ui,
      -apple-system,
      "Segoe UI",
      sans-serif;
    font-variant-numeric: tabular-nums;
    text-align: left;
    cursor: default;
    user-select: text;
  }
  .nibble-chart * {
    box-sizing: border-box;
    margin: 0;
  }
  .nibble-title {
    font-size: 13px;
    font-weight: 600;
    overflow-wrap: anywhere;
  }
  .nibble-subtitle,
  .nibble-note {
    color: var(--nibble-soft);
    font-size: 11px;
    overflow-wrap: anywhere;
  }

  .nibble-size {
    display: flex;
    align-items: baseline;
    flex-wrap: wrap;
    gap: 0 8px;
    margin-top: 10px;
  }
  .nibble-size-after {
    font-size: 21px;
    font-weight: 600;
    letter-spacing: -0.01em;
    line-height: 1.2;
  }
  .nibble-size-before {
    color: var(--nibble-soft);
  }
  .nibble-size-ratio {
    margin-left: auto;
    font-weight: 600;
  }
  .nibble-bar {
    display: flex;
    gap: 1px;
    height: 10px;
    margin-top: 5px;
    border-radius: 3px;
    overflow: hidden;
    background: var(--nibble-rule);
  }
  .nibble-bar > span {
    display: block;
    height: 100%;
    min-width: 1px;
    background: var(--nibble-w4a4);
  }
  .nibble-bar > .nibble-w4a16 {
    background: var(--nibble-w4a16);
  }
  .nibble-bar > .nibble-vq,
  .nibble-bar > .nibble-rows8 {
    background: var(--nibble-vq);
  }
  .nibble-bar > .nibble-keep {
    background: var(--nibble-keep);
  }
  .nibble-bar > .nibble-over {
    background: var(--nibble-bad);
  }

  .nibble-legend {
    display: flex;
    flex-wrap: wrap;
    gap: 2px 14px;
    margin-top: 6px;
    font-size: 11px;
  }
  .nibble-legend > span {
    white-space: nowrap;
  }
  .nibble-legend > span > span {
    color: var(--nibble-soft);
  }
  .nibble-swatch {
    display: inline-block;
    width: 8px;
    height: 8px;
    margin-right: 5px;
    border-radius: 2px;
    background: var(--nibble-w4a4);
  }
  .nibble-swatch.nibble-w4a16 {
    background: var(--nibble-w4a16);
  }
  .nibble-swatch.nibble-vq,
  .nibble-swatch.nibble-rows8 {
    background: var(--nibble-vq);
  }
  .nibble-swatch.nibble-keep {
    background: var(--nibble-keep);
  }
  .nibble-swatch.nibble-over {
    background: var(--nibble-bad);
  }

  .nibble-stats {
    display: flex;
    flex-wrap: wrap;
    gap: 6px 24px;
    margin-top: 12px;
  }
  .nibble-chart dt::first-letter {
    text-transform: uppercase;
  }
  .nibble-stats dt {
    color: var(--nibble-soft);
    font-size: 11px;
  }
  .nibble-stats dd {
    font-weight: 600;
    overflow-wrap: anywhere;
  }
  .nibble-stats .nibble-long {
    font-weight: 400;
  }
  .nibble-facts {
    margin-top: 6px;
  }
  .nibble-facts > div {
    display: flex;
    justify-content: space-between;
    gap: 16px;
    padding: 4px 0;
    border-top: 1px solid var(--nibble-rule);
  }
  .nibble-facts > div:first-child {
    border-top: 0;
  }
  .nibble-facts dt {
    flex: none;
    max-width: 50%;
    color: var(--nibble-soft);
  }
  .nibble-facts dd {
    text-align: right;
    overflow-wrap: anywhere;
  }
  .nibble-facts .nibble-meter,
  .nibble-facts .nibble-text {
    display: block;
  }
  .nibble-facts .nibble-text > dd {
    text-align: left;
  }
  .nibble-meter > div:first-child {
    display: flex;
    justify-content: space-between;
    gap: 16px;
  }
  .nibble-meter .nibble-bar {
    height: 8px;
    margin: 4px 0 2px;
  }

  .nibble-grades {
    display: inline-flex;
    gap: 2px;
    margin-bottom: 2px;
    font-size: 11px;
  }
  .nibble-grade {
    padding: 1px 9px;
    border-radius: 3px;
    background: var(--nibble-rule);
    color: color-mix(in srgb, var(--nibble-ink) 80%, transparent);
    font-weight: 400;
  }
  .nibble-grade-good,
  .nibble-grade-fair,
  .nibble-grade-poor {
    color: #fff;
    font-weight: 600;
    background: #17795d;
  }
  .nibble-grade-fair {
    background: #93590d;
  }
  .nibble-grade-poor {
    background: #b23b37;
  }

  .nibble-details {
    margin-top: 8px;
    border-top: 1px solid var(--nibble-rule);
    padding-top: 7px;
  }
  .nibble-details > summary {
    cursor: pointer;
    font-weight: 600;
  }
  .nibble-details > summary > span {
    font-weight: 400;
    color: var(--nibble-soft);
  }
  .nibble-hard {
    display: grid;
    grid-template-columns: minmax(0, 1fr) 24% 50px;
    gap: 3px 10px;
    align-items: center;
    margin-top: 6px;
    font-size: 11px;
  }
  .nibble-hard > div {
    display: contents;
  }
  .nibble-hard .nibble-bar {
    margin: 0;
    height: 6px;
  }
  .nibble-name {
    overflow-wrap: anywhere;
    line-height: 1.3;
  }
  .nibble-hard .nibble-value {
    text-align: right;
    white-space: nowrap;
  }
  .nibble-why {
    margin-top: 7px;
    font-size: 11px;
  }
  .nibble-why > div:first-child {
    color: var(--nibble-soft);
  }
  .nibble-why ul {
    padding: 0;
    list-style: none;
  }
  .nibble-why li {
    display: flex;
    justify-content: space-between;
    gap: 12px;
    padding: 1px 0;
    overflow-wrap: anywhere;
  }
  .nibble-why li > span:last-child {
    flex: none;
    color: var(--nibble-soft);
  }
  @container (max-width: 300px) {
    .nibble-hard {
      grid-template-columns: minmax(0, 1fr) 50px;
    }
    .nibble-hard .nibble-bar {
      display: none;
    }
  }
`;
