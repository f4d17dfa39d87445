/**
 * "nibble" in the node search lists the loader first. The front end sorts nodes that match equally
 * well by how often they are used, which it knows of few packs, then by the length of their id, by
 * which the loader would come after a dozen of our own nodes.
 */
import { app } from "../../scripts/app.js";

const FIRST = "NibbleLoadSVDQuant";
const USED = 1; // more than 0, which all other nodes of this pack have

app.registerExtension({
  name: "nibble.search",

  /** A definition's own `postProcessSearchScores` takes the place of the front end's. */
  addCustomNodeDefs(definitions) {
    const loader = definitions[FIRST];
    if (loader) loader.postProcessSearchScores = ([match, ...rest]) => [match, -USED, ...rest];
  },
});
