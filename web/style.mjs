/**
 * The charts' style sheet. It lives in each chart's shadow root, so nothing leaks out of it and
 * ComfyUI's own rules do not leak in; colors come from ComfyUI's palette variables, which do cross
 * the boundary. The data colors keep a contrast of 3:1 on both a white and a #222 ground and stay
 * apart for color-blind eyes.
 */
import { CALIBRATION } from "./style/calibration.mjs";
import { FRAME } from "./style/frame.mjs";
import { MEMORY } from "./style/memory.mjs";
import { PATCHES } from "./style/patches.mjs";
import { PLOTS } from "./style/plots.mjs";
import { STRIP } from "./style/strip.mjs";

export const CSS = [FRAME, PLOTS, PATCHES, STRIP, CALIBRATION, MEMORY].join("\n");
