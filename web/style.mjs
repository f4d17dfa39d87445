/**
 * The charts' style sheet. It lives in each chart's shadow root, so nothing leaks out of it and ComfyUI's own rules do not leak in;
 * colours come from ComfyUI's palette variables, which do cross the boundary. The data colours keep a contrast of 3:1 on
 * both a white and a #222 ground and stay apart for colour-blind eyes.
 */
export const CSS = `
:host { display: block; box-sizing: border-box; min-width: 0; }
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
  font: 12px/1.4 Inter, system-ui, -apple-system, "Segoe UI", sans-serif;
  font-variant-numeric: tabular-nums;
  text-align: left;
  cursor: default;
  user-select: text;
}
.nibble-chart * { box-sizing: border-box; margin: 0; }
.nibble-title { font-size: 13px; font-weight: 600; overflow-wrap: anywhere; }
.nibble-subtitle, .nibble-note { color: var(--nibble-soft); font-size: 11px; overflow-wrap: anywhere; }

.nibble-size { display: flex; align-items: baseline; flex-wrap: wrap; gap: 0 8px; margin-top: 10px; }
.nibble-size-after { font-size: 21px; font-weight: 600; letter-spacing: -0.01em; line-height: 1.2; }
.nibble-size-before { color: var(--nibble-soft); }
.nibble-size-ratio { margin-left: auto; font-weight: 600; }
.nibble-bar {
  display: flex; gap: 1px; height: 10px; margin-top: 5px; border-radius: 3px; overflow: hidden;
  background: var(--nibble-rule);
}
.nibble-bar > span { display: block; height: 100%; min-width: 1px; background: var(--nibble-w4a4); }
.nibble-bar > .nibble-w4a16 { background: var(--nibble-w4a16); }
.nibble-bar > .nibble-vq { background: var(--nibble-vq); }
.nibble-bar > .nibble-keep { background: var(--nibble-keep); }
.nibble-bar > .nibble-over { background: var(--nibble-bad); }

.nibble-legend { display: flex; flex-wrap: wrap; gap: 2px 14px; margin-top: 6px; font-size: 11px; }
.nibble-legend > span { white-space: nowrap; }
.nibble-legend > span > span { color: var(--nibble-soft); }
.nibble-swatch { display: inline-block; width: 8px; height: 8px; margin-right: 5px; border-radius: 2px; background: var(--nibble-w4a4); }
.nibble-swatch.nibble-w4a16 { background: var(--nibble-w4a16); }
.nibble-swatch.nibble-vq { background: var(--nibble-vq); }
.nibble-swatch.nibble-keep { background: var(--nibble-keep); }
.nibble-swatch.nibble-over { background: var(--nibble-bad); }

.nibble-stats { display: flex; flex-wrap: wrap; gap: 6px 24px; margin-top: 12px; }
.nibble-chart dt::first-letter { text-transform: uppercase; }
.nibble-stats dt { color: var(--nibble-soft); font-size: 11px; }
.nibble-stats dd { font-weight: 600; overflow-wrap: anywhere; }
.nibble-stats .nibble-long { font-weight: 400; }
.nibble-facts { margin-top: 6px; }
.nibble-facts > div { display: flex; justify-content: space-between; gap: 16px; padding: 4px 0; border-top: 1px solid var(--nibble-rule); }
.nibble-facts > div:first-child { border-top: 0; }
.nibble-facts dt { flex: none; max-width: 50%; color: var(--nibble-soft); }
.nibble-facts dd { text-align: right; overflow-wrap: anywhere; }
.nibble-facts .nibble-meter { display: block; }
.nibble-meter > div:first-child { display: flex; justify-content: space-between; gap: 16px; }
.nibble-meter .nibble-bar { height: 8px; margin: 4px 0 2px; }

.nibble-plot-title { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 12px; margin-top: 14px; }
.nibble-plot-title > span:first-child { font-weight: 600; }
.nibble-plot { position: relative; margin-top: 6px; padding-left: 26px; }
.nibble-plot svg { display: block; width: 100%; overflow: visible; outline: none; }
.nibble-plot svg:focus-visible { outline: 1px solid var(--nibble-soft); outline-offset: 2px; }
.nibble-tick {
  position: absolute; left: 0; width: 20px; text-align: right; font-size: 10px; line-height: 12px;
  color: var(--nibble-soft); transform: translateY(-6px);
}
.nibble-grid { stroke: var(--nibble-rule); stroke-width: 1; shape-rendering: crispEdges; }
.nibble-median { stroke: var(--nibble-soft); stroke-width: 1; stroke-dasharray: 4 3; }
.nibble-group-rule { stroke: var(--nibble-rule); stroke-width: 1; }
.nibble-stem { stroke: var(--nibble-w4a4); opacity: .38; }
.nibble-stem.nibble-w4a16 { stroke: var(--nibble-w4a16); }
.nibble-stem.nibble-vq { stroke: var(--nibble-vq); }
.nibble-dot, .nibble-cell { fill: var(--nibble-w4a4); }
.nibble-dot.nibble-w4a16, .nibble-cell.nibble-w4a16 { fill: var(--nibble-w4a16); }
.nibble-dot.nibble-vq, .nibble-cell.nibble-vq { fill: var(--nibble-vq); }
.nibble-learning { fill: none; stroke: var(--nibble-vq); stroke-width: 1.5; vector-effect: non-scaling-stroke; opacity: .75; }
.nibble-dot.nibble-keep, .nibble-cell.nibble-keep { fill: var(--nibble-keep); }
.nibble-cell { shape-rendering: crispEdges; }
.nibble-cursor { stroke: var(--nibble-ink); stroke-width: 1; opacity: .55; }
.nibble-halo { fill: none; stroke: var(--nibble-ink); stroke-width: 1.5; }
.nibble-raw { fill: var(--nibble-w4a4); opacity: .42; }
.nibble-line { fill: none; stroke: var(--nibble-w4a16); stroke-width: 2; stroke-linejoin: round; vector-effect: non-scaling-stroke; }
.nibble-lowest { fill: none; stroke: var(--nibble-w4a16); stroke-width: 1.5; }
.nibble-phase { stroke: var(--nibble-soft); stroke-width: 1; stroke-dasharray: 4 3; shape-rendering: crispEdges; }
.nibble-curve > .nibble-tick { width: auto; }
.nibble-steps { position: relative; height: 15px; margin-top: 3px; font-size: 10px; line-height: 15px; color: var(--nibble-soft); }
.nibble-steps > span { position: absolute; transform: translateX(-50%); white-space: nowrap; }
.nibble-steps > .nibble-end { transform: none; }
.nibble-groups { position: relative; height: 15px; margin-top: 3px; font-size: 10px; line-height: 15px; color: var(--nibble-soft); }
.nibble-groups > span {
  position: absolute; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; text-align: center; padding: 0 2px;
}
.nibble-tip {
  position: absolute; z-index: 1; bottom: calc(100% - 2px); width: max-content; max-width: min(260px, 100%);
  padding: 6px 9px; border-radius: 6px; pointer-events: none;
  background: color-mix(in srgb, var(--comfy-menu-bg, #353535) 96%, var(--nibble-ink));
  border: 1px solid var(--border-color, #4e4e4e); box-shadow: 0 2px 10px rgb(0 0 0 / .28); font-size: 11px;
}
.nibble-tip b { display: block; overflow-wrap: anywhere; }
.nibble-tip div { color: var(--nibble-soft); }
.nibble-tip div.nibble-tip-db { color: var(--nibble-ink); }

.nibble-pictures { display: flex; flex-wrap: wrap; gap: 6px; margin-top: 10px; }
.nibble-picture { position: relative; flex: 1 1 140px; min-width: 0; }
.nibble-picture img { display: block; width: 100%; border-radius: 4px; }
.nibble-picture svg { position: absolute; inset: 0; width: 100%; height: 100%; border-radius: 4px; shape-rendering: crispEdges; }
.nibble-veil { fill: #0b0d10; }
.nibble-swatch.nibble-patch { background: color-mix(in srgb, #0b0d10 var(--veil), #d4d8de); box-shadow: 0 0 0 1px var(--nibble-rule); }
.nibble-layers-left { display: block; width: 100%; height: 56px; margin-top: 6px; }
.nibble-strip {
  position: relative; display: grid; grid-template-columns: 26px minmax(0, 1fr); gap: 0 6px; margin-top: 10px; outline: none;
}
.nibble-strip-named { grid-template-columns: minmax(26px, max-content) minmax(0, 1fr); }
.nibble-strip-bare { grid-template-columns: 0 minmax(0, 1fr); gap: 0; }
.nibble-strip:focus-visible { outline: 1px solid var(--nibble-soft); outline-offset: 2px; }
.nibble-strip-name {
  position: relative; align-self: center; max-width: 110px; overflow: hidden; text-overflow: ellipsis; white-space: nowrap;
  text-align: right; font-size: 10px; line-height: 12px; color: var(--nibble-soft);
}
.nibble-strip-scale { align-self: stretch; overflow: visible; }
.nibble-strip-scale > span { position: absolute; right: 0; transform: translateY(-6px); }
.nibble-change { display: block; width: 100%; overflow: visible; }
.nibble-area { fill: var(--nibble-w4a4); opacity: .2; }
.nibble-teeth { fill: none; stroke: var(--nibble-w4a4); stroke-width: 1.5; stroke-linejoin: round; vector-effect: non-scaling-stroke; }
.nibble-threshold { stroke: var(--nibble-w4a16); stroke-width: 1.5; stroke-dasharray: 5 3; vector-effect: non-scaling-stroke; }
.nibble-change .nibble-cursor { vector-effect: non-scaling-stroke; }
.nibble-lane { display: flex; height: 18px; margin-top: 3px; }
.nibble-strip-named .nibble-lane { height: 14px; }
.nibble-step { flex: 1 1 0; min-width: 0; border-radius: 2px; }
.nibble-step-computed { background: var(--nibble-w4a4); }
.nibble-step-reused {
  background: color-mix(in srgb, var(--nibble-w4a4) 20%, transparent);
  box-shadow: inset 0 0 0 1px color-mix(in srgb, var(--nibble-w4a4) 60%, transparent);
}
.nibble-lane-fine .nibble-step { border-radius: 1px; }
.nibble-lane-fine .nibble-step-reused { box-shadow: none; }
.nibble-step-pending { background: var(--nibble-rule); }
.nibble-step-chosen { outline: 1.5px solid var(--nibble-ink); outline-offset: 0; }
.nibble-numbers { position: relative; height: 14px; margin-top: 2px; font-size: 10px; line-height: 14px; color: var(--nibble-soft); }
.nibble-numbers > span { position: absolute; transform: translateX(-50%); }
.nibble-dash { display: inline-block; width: 14px; height: 0; margin-right: 5px; vertical-align: 3px; border-top: 2px solid var(--nibble-w4a4); }
.nibble-dash-threshold { border-top: 2px dashed var(--nibble-w4a16); }

.nibble-xy { position: relative; margin: 6px 4px 0 34px; }
.nibble-xy svg { display: block; width: 100%; overflow: visible; }
.nibble-xy .nibble-tick { left: -30px; width: 26px; }
.nibble-xy-x { position: relative; height: 13px; margin-top: 3px; font-size: 10px; line-height: 13px; color: var(--nibble-soft); }
.nibble-xy-x > span { position: absolute; transform: translateX(-50%); }
.nibble-xy-label { text-align: center; font-size: 10px; color: var(--nibble-soft); }
.nibble-point { fill: var(--nibble-w4a4); opacity: .5; }
.nibble-fit { fill: none; stroke-width: 1.75; stroke-linejoin: round; vector-effect: non-scaling-stroke; stroke: var(--nibble-w4a4); }
.nibble-fit-1 { stroke: var(--nibble-w4a16); }
.nibble-fit-2 { stroke: var(--nibble-keep); }
.nibble-fit-3 { stroke: #2f9e6e; }
.nibble-fit-4 { stroke: #9a72d0; }
.nibble-fit-5 { stroke: #d9534f; }
.nibble-dash-1 { border-color: var(--nibble-w4a16); }
.nibble-dash-2 { border-color: var(--nibble-keep); }
.nibble-dash-3 { border-color: #2f9e6e; }
.nibble-dash-4 { border-color: #9a72d0; }
.nibble-dash-5 { border-color: #d9534f; }

.nibble-details { margin-top: 8px; border-top: 1px solid var(--nibble-rule); padding-top: 7px; }
.nibble-details > summary { cursor: pointer; font-weight: 600; }
.nibble-details > summary > span { font-weight: 400; color: var(--nibble-soft); }
.nibble-hard {
  display: grid; grid-template-columns: minmax(0, 1fr) 24% 50px; gap: 3px 10px; align-items: center; margin-top: 6px;
  font-size: 11px;
}
.nibble-hard > div { display: contents; }
.nibble-hard .nibble-bar { margin: 0; height: 6px; }
.nibble-name { overflow-wrap: anywhere; line-height: 1.3; }
.nibble-hard .nibble-value { text-align: right; white-space: nowrap; }
.nibble-why { margin-top: 7px; font-size: 11px; }
.nibble-why > div:first-child { color: var(--nibble-soft); }
.nibble-why ul { padding: 0; list-style: none; }
.nibble-why li { display: flex; justify-content: space-between; gap: 12px; padding: 1px 0; overflow-wrap: anywhere; }
.nibble-why li > span:last-child { flex: none; color: var(--nibble-soft); }
@container (max-width: 300px) { .nibble-hard { grid-template-columns: minmax(0, 1fr) 50px; } .nibble-hard .nibble-bar { display: none; } }
`;
