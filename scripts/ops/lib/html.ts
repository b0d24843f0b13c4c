/** Markup and charts of a page that holds all it needs. Whatever is put into it is text, unless it was made here. */

/** A piece of a page, as it is written. */
export class Markup {
  readonly text: string;
  constructor(text: string) {
    this.text = text;
  }
}

/** html`<p>${text}</p>`: text is escaped, and cannot turn the direction of what follows; lists are joined. */
export function html(parts: TemplateStringsArray, ...values: unknown[]): Markup {
  return new Markup(String.raw({ raw: parts }, ...values.map(write)));
}

function write(value: unknown): string {
  if (value instanceof Markup) return value.text;
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

/** A run or a day: told apart by shape; or a word. */
export interface Cell {
  /** Row 0 is the first one, whether there are more or not. */
  column: number;
  row: number;
  kind: "done" | "failed" | "gone" | "label";
  /** 0 to 1: how high, or how dark. */
  share: number;
  /** On hover. */
  title: string;
}

/** Cells at their places: bars, whose heights are their shares; or squares, whose shades are. Words under them. */
export function chart(words: string, cells: Cell[], bars: boolean): Markup {
  const tall = bars ? 72 : 96;
  const drawn = cells.map(({ column, row, kind, share, title }) => {
    const [x, y] = [12 * column, bars ? tall : 12 * (row + 1)]; // its left and its foot
    const [height, opacity] = bars ? [Math.max(2, 70 * share), 1] : [10, 0.2 + 0.8 * share];
    if (kind === "label") return html`<text x="${x}" y="${y - 3}">${title}</text>`;
    const shapes = {
      done: html`<rect class="done" x="${x}" y="${y - height}" width="10" height="${height}" opacity="${opacity}"/>`,
      failed: html`<path class="failed" d="M${x} ${y - 10}l10 10m0 -10l-10 10"/>`,
      gone: html`<rect class="gone" x="${x + 1}" y="${y - 9}" width="8" height="8"/>`,
    };
    const place = Math.max(12, height); // what hover reaches, also where there is next to nothing to see
    return html`<g><title>${title}</title><rect class="place" x="${x}" y="${y - place}" width="12" height="${place}"/>${shapes[kind]}</g>`;
  });
  return html`<figure class="scroll"><svg class="${bars ? "bars" : "calendar"}" viewBox="0 0 720 ${tall}" role="img"
    aria-label="${words}">${drawn}</svg><figcaption>${words}</figcaption></figure>`;
}
