/**
 * The style sheet of charts and notices. It lives in the shadow root of each, so nothing leaks out
 * of it and ComfyUI's own rules do not leak in; colors come from ComfyUI's palette variables, which
 * do cross the boundary. The data colors keep a contrast of 3:1 on both a white and a #222 ground
 * and stay apart for color-blind eyes.
 */
import { CALIBRATION } from "./style/calibration.mjs";
import { FRAME } from "./style/frame.mjs";
import { MEMORY } from "./style/memory.mjs";
import { NOTICE } from "./style/notice.mjs";
import { PATCHES } from "./style/patches.mjs";
import { PLOTS } from "./style/plots.mjs";
import { STRIP } from "./style/strip.mjs";

const CSS = [FRAME, PLOTS, PATCHES, STRIP, CALIBRATION, MEMORY, NOTICE].join("\n");
let made = null;

/** One style sheet for all of the page. */
export function sheet() {
  if (!made) {
    made = new CSSStyleSheet();
    made.replaceSync(CSS);
  }
  return made;
}
