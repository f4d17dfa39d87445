/** The strip of a sampling run. */
const css = String.raw;

export const STRIP = css`
  .nibble-strip {
    position: relative;
    display: grid;
    grid-template-columns: 26px minmax(0, 1fr);
    gap: 0 6px;
    margin-top: 10px;
    outline: none;
  }
  .nibble-strip-named {
    grid-template-columns: minmax(26px, max-content) minmax(0, 1fr);
  }
  .nibble-strip-bare {
    grid-template-columns: 0 minmax(0, 1fr);
    gap: 0;
  }
  .nibble-strip:focus-visible {
    outline: 1px solid var(--nibble-soft);
    outline-offset: 2px;
  }
  .nibble-strip-name {
    position: relative;
    align-self: center;
    max-width: 110px;
    overflow: hidden;
    text-overflow: ellipsis;
    white-space: nowrap;
    text-align: right;
    font-size: 10px;
    line-height: 12px;
    color: var(--nibble-soft);
  }
  .nibble-strip-scale {
    align-self: stretch;
    overflow: visible;
  }
  .nibble-strip-scale > span {
    position: absolute;
    right: 0;
    transform: translateY(-6px);
  }
  .nibble-change {
    display: block;
    width: 100%;
    overflow: visible;
  }
  .nibble-area {
    fill: var(--nibble-w4a4);
    opacity: 0.2;
  }
  .nibble-teeth {
    fill: none;
    stroke: var(--nibble-w4a4);
    stroke-width: 1.5;
    stroke-linejoin: round;
    vector-effect: non-scaling-stroke;
  }
  .nibble-threshold {
    stroke: var(--nibble-w4a16);
    stroke-width: 1.5;
    stroke-dasharray: 5 3;
    vector-effect: non-scaling-stroke;
  }
  .nibble-change .nibble-cursor {
    vector-effect: non-scaling-stroke;
  }
  .nibble-lane {
    display: flex;
    height: 18px;
    margin-top: 3px;
  }
  .nibble-strip-named .nibble-lane {
    height: 14px;
  }
  .nibble-step {
    flex: 1 1 0;
    min-width: 0;
    border-radius: 2px;
  }
  .nibble-step-computed {
    background: var(--nibble-w4a4);
  }
  .nibble-step-reused {
    background: color-mix(in srgb, var(--nibble-w4a4) 20%, transparent);
    box-shadow: inset 0 0 0 1px color-mix(in srgb, var(--nibble-w4a4) 60%, transparent);
  }
  .nibble-lane-fine .nibble-step {
    border-radius: 1px;
  }
  .nibble-lane-fine .nibble-step-reused {
    box-shadow: none;
  }
  .nibble-step-pending {
    background: var(--nibble-rule);
  }
  .nibble-step-chosen {
    outline: 1.5px solid var(--nibble-ink);
    outline-offset: 0;
  }
  .nibble-numbers {
    position: relative;
    height: 14px;
    margin-top: 2px;
    font-size: 10px;
    line-height: 14px;
    color: var(--nibble-soft);
  }
  .nibble-numbers > span {
    position: absolute;
    transform: translateX(-50%);
  }
  .nibble-dash {
    display: inline-block;
    width: 14px;
    height: 0;
    margin-right: 5px;
    vertical-align: 3px;
    border-top: 2px solid var(--nibble-w4a4);
  }
  .nibble-dash-threshold {
    border-top: 2px dashed var(--nibble-w4a16);
  }
`;
