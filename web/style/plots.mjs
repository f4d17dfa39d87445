/** Plots of layers, blocks and losses: axes, marks, cursors and tips. */
const css = String.raw;

export const PLOTS = css`
  .nibble-plot-title {
    display: flex;
    flex-wrap: wrap;
    justify-content: space-between;
    gap: 0 12px;
    margin-top: 14px;
  }
  .nibble-plot-title > span:first-child {
    font-weight: 600;
  }
  .nibble-plot {
    position: relative;
    margin-top: 6px;
    padding-left: 26px;
  }
  .nibble-plot svg {
    display: block;
    width: 100%;
    overflow: visible;
    outline: none;
  }
  .nibble-plot svg:focus-visible {
    outline: 1px solid var(--nibble-soft);
    outline-offset: 2px;
  }
  .nibble-tick {
    position: absolute;
    left: 0;
    width: 20px;
    text-align: right;
    font-size: 10px;
    line-height: 12px;
    color: var(--nibble-soft);
    transform: translateY(-6px);
  }
  .nibble-grid {
    stroke: var(--nibble-rule);
    stroke-width: 1;
    shape-rendering: crispEdges;
  }
  .nibble-median {
    stroke: var(--nibble-soft);
    stroke-width: 1;
    stroke-dasharray: 4 3;
  }
  .nibble-group-rule {
    stroke: var(--nibble-rule);
    stroke-width: 1;
  }
  .nibble-stem {
    stroke: var(--nibble-w4a4);
    opacity: 0.38;
  }
  .nibble-stem.nibble-w4a16 {
    stroke: var(--nibble-w4a16);
  }
  .nibble-stem.nibble-vq,
  .nibble-stem.nibble-rows8 {
    stroke: var(--nibble-vq);
  }
  .nibble-dot,
  .nibble-cell {
    fill: var(--nibble-w4a4);
  }
  .nibble-dot.nibble-w4a16,
  .nibble-cell.nibble-w4a16 {
    fill: var(--nibble-w4a16);
  }
  .nibble-dot.nibble-vq,
  .nibble-dot.nibble-rows8,
  .nibble-cell.nibble-vq,
  .nibble-cell.nibble-rows8 {
    fill: var(--nibble-vq);
  }
  .nibble-learning {
    fill: none;
    stroke: var(--nibble-vq);
    stroke-width: 1.5;
    vector-effect: non-scaling-stroke;
    opacity: 0.75;
  }
  .nibble-dot.nibble-keep,
  .nibble-cell.nibble-keep {
    fill: var(--nibble-keep);
  }
  .nibble-cell {
    shape-rendering: crispEdges;
  }
  .nibble-cursor {
    stroke: var(--nibble-ink);
    stroke-width: 1;
    opacity: 0.55;
  }
  .nibble-halo {
    fill: none;
    stroke: var(--nibble-ink);
    stroke-width: 1.5;
  }
  .nibble-raw {
    fill: var(--nibble-w4a4);
    opacity: 0.42;
  }
  .nibble-line {
    fill: none;
    stroke: var(--nibble-w4a16);
    stroke-width: 2;
    stroke-linejoin: round;
    vector-effect: non-scaling-stroke;
  }
  .nibble-lowest {
    fill: none;
    stroke: var(--nibble-w4a16);
    stroke-width: 1.5;
  }
  .nibble-phase {
    stroke: var(--nibble-soft);
    stroke-width: 1;
    stroke-dasharray: 4 3;
    shape-rendering: crispEdges;
  }
  .nibble-curve > .nibble-tick {
    width: auto;
  }
  .nibble-steps {
    position: relative;
    height: 15px;
    margin-top: 3px;
    font-size: 10px;
    line-height: 15px;
    color: var(--nibble-soft);
  }
  .nibble-steps > span {
    position: absolute;
    transform: translateX(-50%);
    white-space: nowrap;
  }
  .nibble-steps > .nibble-end {
    transform: none;
  }
  .nibble-groups {
    position: relative;
    height: 15px;
    margin-top: 3px;
    font-size: 10px;
    line-height: 15px;
    color: var(--nibble-soft);
  }
  .nibble-groups > span {
    position: absolute;
    overflow: hidden;
    text-overflow: ellipsis;
    white-space: nowrap;
    text-align: center;
    padding: 0 2px;
  }
  .nibble-tip {
    position: absolute;
    z-index: 1;
    bottom: calc(100% - 2px);
    width: max-content;
    max-width: min(260px, 100%);
    padding: 6px 9px;
    border-radius: 6px;
    pointer-events: none;
    background: color-mix(in srgb, var(--comfy-menu-bg, #353535) 96%, var(--nibble-ink));
    border: 1px solid var(--border-color, #4e4e4e);
    box-shadow: 0 2px 10px rgb(0 0 0 / 0.28);
    font-size: 11px;
  }
  .nibble-tip b {
    display: block;
    overflow-wrap: anywhere;
  }
  .nibble-tip div {
    color: var(--nibble-soft);
  }
  .nibble-tip div.nibble-tip-db {
    color: var(--nibble-ink);
  }
`;
