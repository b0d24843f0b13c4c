/** Markup and charts of a page that holds all it needs. Whatever is put into it is text, unless it was made here. */

/** A piece of a page, as it is written. */
export class Markup extends String {}

/** html`<p>${text}</p>`: text is escaped, and cannot turn the direction of what follows; lists are joined. */
export const html = (parts: TemplateStringsArray, ...values: unknown[]): Markup =>
  new Markup(String.raw({ raw: parts }, ...values.map(write)));

function write(value: unknown): string {
  if (value instanceof Markup) return String(value);
  if (Array.isArray(value)) return value.map(write).join("");
  const text = String(value ?? "").replaceAll(/[^\P{Cc}\n]|[\u202a-\u202e\u2066-\u2069]/gu, "?");
  return text.replaceAll(/[&<>"'`]/g, (sign) => `&#${sign.charCodeAt(0)};`);
}

/** Rows under their names; numbers at the right. @param next the command that makes the first row. */
export function table(names: string[], rows: unknown[][] | null, next = ""): Markup {
  if (!rows) return html`<p>None yet. Next: ${next}</p>`;
  const cell = (value: unknown): Markup =>
    typeof value === "number" ? html`<td class="number">${value.toLocaleString("en-US")}</td>` : html`<td>${value}</td>`;
  const line = (row: unknown[]): Markup => html`<tr>${row.map(cell)}</tr>`;
  return html`<div class="scroll"><table><tr>${names.map((name) => html`<th>${name}</th>`)}</tr>${rows.map(line)}</table></div>`;
}

/** A run, a day or a label, as sql/report.sql writes it: told apart by shape. */
export type Cell = { column: number; row: number; kind: "done" | "failed" | "gone" | "label"; share: number; title: string };

/** Cells at their places: bars, whose heights are their shares; or a calendar of squares, whose shades are. Words under them. */
export function chart(words: string, cells: Cell[], look: "bars" | "calendar"): Markup {
  const drawn = cells.map(({ column, row, kind, share, title }) => {
    const place = `grid-area: ${row} / ${column}; --share: ${share}`;
    return kind === "label" ? html`<b style="${place}">${title}</b>` : html`<i class="${kind}" style="${place}" title="${title}"></i>`;
  });
  return html`<figure class="scroll"><div class="${look}" role="img" aria-label="${words}">${drawn}</div>
    <figcaption>${words}</figcaption></figure>`;
}
