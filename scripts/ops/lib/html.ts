/** Markup of a page that holds all it needs. Whatever is put into it is text, unless it was made here. */

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

type Row = (string | number | null)[];
/** A run, a day or a label: told apart by shape. */
type Cell = { column: number; row: number; kind: "done" | "failed" | "gone" | "label"; share: number; title: string };

/** What sql/report.sql returns; it says what each is. */
export type Block = { kind: string; text: string; look?: string; names?: string[]; rows?: Row[] | null; cells?: Cell[] | null };

export function render({ kind, text, look = "", names = [], rows, cells }: Block): Markup {
  const cell = (value: unknown): Markup =>
    typeof value === "number" ? html`<td class="number">${value.toLocaleString("en-US")}</td>` : html`<td>${value}</td>`;
  if (rows) {
    const lines = [html`<tr>${names.map((name) => html`<th>${name}</th>`)}</tr>`, ...rows.map((row) => html`<tr>${row.map(cell)}</tr>`)];
    const table = html`<div class="scroll"><table>${lines}</table></div>`;
    return text ? html`<details><summary>${text}</summary>${table}</details>` : table;
  }
  // Bars, whose heights are their shares; or a calendar of squares, whose shades are.
  const drawn = cells?.map(({ column, row, kind, share, title }) => {
    const place = `grid-area: ${row} / ${column}; --share: ${share}`;
    return kind === "label" ? html`<b style="${place}">${title}</b>` : html`<i class="${kind}" style="${place}" title="${title}"></i>`;
  });
  if (drawn)
    return html`<figure class="scroll"><div class="${kind}" role="img" aria-label="${text}">${drawn}</div>
      <figcaption>${text}</figcaption></figure>`;
  const tag = new Markup(kind);
  return text ? html`<${tag} class="${look}">${text}</${tag}>` : html``;
}
