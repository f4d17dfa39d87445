/**
 * Our nodes' places in ComfyUI's menus in the user's language. ComfyUI has translations of menu
 * words of its own, but one word there changes the menus of all packs; these change ours alone.
 */
import { app } from "../../scripts/app.js";
import { loadWords, say } from "./words.mjs";

app.registerExtension({
  name: "nibble.menu",

  /** Before nodes are registered. */
  init: loadWords,

  /** Called again when the language is changed, and with each refresh of the lists. */
  beforeRegisterNodeDef(nodeType, definition) {
    if (definition.name.startsWith("Nibble"))
      definition.category = definition.category
        .split("/")
        .map((word) => say(word))
        .join("/");
  },
});
