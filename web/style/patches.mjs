/** The pictures of FEATHER's chart. */
const css = String.raw;

export const PATCHES = css`
  .nibble-pictures {
    display: flex;
    flex-wrap: wrap;
    gap: 6px;
    margin-top: 10px;
  }
  .nibble-picture {
    position: relative;
    flex: 1 1 140px;
    min-width: 0;
  }
  .nibble-picture img {
    display: block;
    width: 100%;
    border-radius: 4px;
  }
  .nibble-picture svg {
    position: absolute;
    inset: 0;
    width: 100%;
    height: 100%;
    border-radius: 4px;
    shape-rendering: crispEdges;
  }
  .nibble-veil {
    fill: #0b0d10;
  }
  .nibble-swatch.nibble-patch {
    background: color-mix(in srgb, #0b0d10 var(--veil), #d4d8de);
    box-shadow: 0 0 0 1px var(--nibble-rule);
  }
  .nibble-layers-left {
    display: block;
    width: 100%;
    height: 56px;
    margin-top: 6px;
  }
`;
