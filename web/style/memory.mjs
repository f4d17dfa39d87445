/** The memory plan: bars of the stages, and the list of switches. */
const css = String.raw;

export const MEMORY = css`
  .nibble-verdict {
    margin-top: 6px;
    font-size: 14px;
    font-weight: 600;
  }
  .nibble-verdict::first-letter {
    text-transform: uppercase;
  }
  .nibble-memory {
    margin-top: 8px;
  }
  .nibble-memory dt {
    flex: none;
    color: var(--nibble-soft);
  }
  .nibble-memory dd {
    text-align: right;
    overflow-wrap: anywhere;
  }
  .nibble-memory .nibble-bar {
    height: 12px;
  }
  .nibble-bar > .nibble-stays,
  .nibble-swatch.nibble-stays {
    background: repeating-linear-gradient(
      135deg,
      color-mix(in srgb, var(--nibble-w4a4) 55%, transparent) 0 3px,
      transparent 3px 6px
    );
  }
  .nibble-switches {
    margin-top: 6px;
    padding: 0;
    list-style: none;
    font-size: 11px;
  }
  .nibble-switches > li {
    padding: 4px 0;
    border-top: 1px solid var(--nibble-rule);
  }
  .nibble-switches > li > div:first-child {
    display: flex;
    justify-content: space-between;
    gap: 12px;
    font-size: 12px;
  }
  .nibble-switches > li > div:not(:first-child) {
    color: var(--nibble-soft);
  }
  .nibble-off > div:first-child {
    color: var(--nibble-soft);
  }
`;
