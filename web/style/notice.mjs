/** Notices: an error, work under way, what was stopped, unfinished files. */
const css = String.raw;

export const NOTICE = css`
  .nibble-notice {
    --nibble-tone: var(--nibble-w4a4);
    padding: 10px 12px;
    border-left: 4px solid var(--nibble-tone);
    background: color-mix(in srgb, var(--nibble-tone) 12%, var(--bg-color, #202020));
    line-height: 1.45;
  }
  .nibble-notice-error {
    --nibble-tone: var(--nibble-bad);
  }
  .nibble-notice-stopped {
    --nibble-tone: var(--nibble-w4a16);
  }
  .nibble-notice-files {
    --nibble-tone: var(--nibble-keep);
  }
  .nibble-notice-title {
    font-weight: 600;
    overflow-wrap: anywhere;
  }
  .nibble-notice-title::first-letter {
    text-transform: uppercase;
  }
  .nibble-notice > p {
    margin: 2px 0 0;
    overflow-wrap: anywhere;
    cursor: text;
  }
  .nibble-notice > .nibble-bar {
    height: 6px;
    margin-top: 7px;
  }
  .nibble-notice > .nibble-bar > span {
    background: var(--nibble-tone);
  }
  .nibble-actions {
    display: flex;
    flex-wrap: wrap;
    gap: 6px;
    margin-top: 8px;
  }
  .nibble-action {
    padding: 3px 10px;
    border: 1px solid color-mix(in srgb, var(--nibble-ink) 30%, transparent);
    border-radius: 6px;
    background: color-mix(in srgb, var(--nibble-ink) 8%, transparent);
    color: inherit;
    font: inherit;
    text-decoration: none;
    cursor: pointer;
  }
  .nibble-action:hover {
    background: color-mix(in srgb, var(--nibble-ink) 18%, transparent);
  }
  .nibble-action:focus-visible {
    outline: 2px solid var(--nibble-ink);
    outline-offset: 1px;
  }
`;
