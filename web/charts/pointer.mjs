/**
 * Choosing one of a plot's items with the pointer or the arrow keys, and the tip above the chosen
 * one. Rectangles are measured on screen, so the canvas zoom does not matter.
 */

/**
 * Calls choose(index) for the item under the pointer or next to the last one, and leave() when
 * neither points at any. `count` is the number of items; at(event) -> the index under the pointer,
 * or null for none.
 */
export function chooseItems(element, { count, at, choose, leave }) {
  let current = -1;
  const take = (index) => {
    current = Math.max(0, Math.min(count - 1, index));
    choose(current);
  };
  element.addEventListener("pointermove", (event) => {
    const index = at(event);
    if (index === null) leave();
    else take(index);
  });
  element.addEventListener("pointerleave", leave);
  element.addEventListener("blur", leave);
  element.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || !count) return;
    event.preventDefault();
    event.stopPropagation();
    take(current + step);
  });
}

/** Where the pointer is, as a share of the element's width. */
export function shareOf(element, event) {
  const box = element.getBoundingClientRect();
  return (event.clientX - box.left) / box.width;
}

/** Centers a tip on `center` (pixels from the plot's left edge) as far as the width allows. */
export function placeTip(tip, plot, center) {
  const most = plot.clientWidth - tip.offsetWidth;
  tip.style.left = `${Math.max(0, Math.min(center - tip.offsetWidth / 2, most))}px`;
}

/** A place in the picture, in per cent of its width -> pixels from the plot's left edge. */
export function centerOf(plot, picture, percent) {
  return plot.clientWidth - picture.clientWidth + (picture.clientWidth * percent) / 100;
}
