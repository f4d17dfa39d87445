/** Small builders and number formats shared by the charts. */

const SVG = "http://www.w3.org/2000/svg";

/**
 * Makes an HTML element: h("p.nibble-note", {title: "x"}, "text", child, ...). Text is never parsed
 * as HTML.
 */
export function h(selector, ...content) {
  const [tag, ...classes] = selector.split(".");
  return fill(document.createElement(tag || "div"), classes, content);
}

/** The same for SVG. */
export function s(selector, ...content) {
  const [tag, ...classes] = selector.split(".");
  return fill(document.createElementNS(SVG, tag), classes, content);
}

function fill(element, classes, content) {
  if (classes.length) element.setAttribute("class", classes.join(" "));
  for (const item of content.flat()) {
    if (item === null || item === undefined || item === false) continue;
    if (item instanceof Node || typeof item !== "object") element.append(item);
    else
      for (const [name, value] of Object.entries(item)) element.setAttribute(name, String(value));
  }
  return element;
}

/** 6541234567 -> "6.54 GB" (decimal units, as disks and download pages count). */
export function bytes(count) {
  if (!Number.isFinite(count)) return "?";
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (count >= 999.5 && unit < units.length - 1) {
    count /= 1000;
    unit += 1;
  }
  return `${unit === 0 ? count : count.toPrecision(3)} ${units[unit]}`;
}

/** 734.2 -> "12 min 14 s". */
export function duration(seconds) {
  if (!Number.isFinite(seconds)) return "?";
  if (seconds < 10) return `${seconds.toFixed(seconds < 1 ? 2 : 1)} s`;
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}

/** 21.437 -> "21.4 dB". */
export function decibels(value) {
  return `${value.toFixed(1)} dB`;
}

export function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

export function sum(items, value) {
  return items.reduce((total, item) => total + (Number.isFinite(value(item)) ? value(item) : 0), 0);
}

/** Splits items into a Map by key, in order of first appearance. */
export function groupBy(items, key) {
  const groups = new Map();
  for (const item of items) {
    const name = key(item);
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(item);
  }
  return groups;
}
