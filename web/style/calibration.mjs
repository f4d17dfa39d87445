/** The plots of a calibration. */
const css = String.raw;

export const CALIBRATION = css`
  .nibble-xy {
    position: relative;
    margin: 6px 4px 0 34px;
  }
  .nibble-xy svg {
    display: block;
    width: 100%;
    overflow: visible;
  }
  .nibble-xy .nibble-tick {
    left: -30px;
    width: 26px;
  }
  .nibble-xy-x {
    position: relative;
    height: 13px;
    margin-top: 3px;
    font-size: 10px;
    line-height: 13px;
    color: var(--nibble-soft);
  }
  .nibble-xy-x > span {
    position: absolute;
    transform: translateX(-50%);
  }
  .nibble-xy-label {
    text-align: center;
    font-size: 10px;
    color: var(--nibble-soft);
  }
  .nibble-point {
    fill: var(--nibble-w4a4);
    opacity: 0.5;
  }
  .nibble-fit {
    fill: none;
    stroke-width: 1.75;
    stroke-linejoin: round;
    vector-effect: non-scaling-stroke;
    stroke: var(--nibble-w4a4);
  }
  .nibble-fit-1 {
    stroke: var(--nibble-w4a16);
  }
  .nibble-fit-2 {
    stroke: var(--nibble-keep);
  }
  .nibble-fit-3 {
    stroke: #2f9e6e;
  }
  .nibble-fit-4 {
    stroke: #9a72d0;
  }
  .nibble-fit-5 {
    stroke: #d9534f;
  }
  .nibble-dash-1 {
    border-color: var(--nibble-w4a16);
  }
  .nibble-dash-2 {
    border-color: var(--nibble-keep);
  }
  .nibble-dash-3 {
    border-color: #2f9e6e;
  }
  .nibble-dash-4 {
    border-color: #9a72d0;
  }
  .nibble-dash-5 {
    border-color: #d9534f;
  }
`;
