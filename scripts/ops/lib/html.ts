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

/** Rows under their names; numbers at the right. */
export function htmlTable(names: string[], rows: unknown[][]): Markup {
  const cell = (value: unknown): Markup =>
    typeof value === "number"
      ? html`<td class="number">${value.toLocaleString("en-US")}</td>`
      : html`<td>${value}</td>`;
  const line = (row: unknown[]): Markup => html`<tr>${row.map(cell)}</tr>`;
  return html`<div class="scroll"><table><tr>${names.map((name) => html`<th>${name}</th>`)}</tr>${rows.map(line)}</table></div>`;
}

/** A run or a day: told apart by shape. */
export interface Cell {
  /** On hover. */
  title: string;
  kind: "done" | "failed" | "gone";
  /** 0 to 1: how high, or how dark. */
  share: number;
}

/** A bar or a square with its foot at x, y; a cross where it failed, an outline of dashes where it is gone. */
function draw({ title, kind }: Cell, x: number, y: number, height: number, opacity: number): Markup {
  const shapes = {
    done: html`<rect class="done" x="${x}" y="${y - height}" width="10" height="${height}" opacity="${opacity}"/>`,
    failed: html`<path class="failed" d="M${x} ${y - 10}l10 10m0 -10l-10 10"/>`,
    gone: html`<rect class="gone" x="${x + 1}" y="${y - 9}" width="8" height="8"/>`,
  };
  const place = Math.max(12, height); // what hover reaches, also where there is next to nothing to see
  return html`<g><title>${title}</title><rect class="place" x="${x}" y="${y - place}" width="12" height="${place}"/>${shapes[kind]}</g>`;
}

/** Up to 60 bars, the newest at the right. */
export function bars(cells: Cell[], label: string): Markup {
  const drawn = cells.map((cell, at) =>
    draw(cell, 720 - 12 * (cells.length - at), 70, Math.max(2, 70 * cell.share), 1),
  );
  return html`<svg viewBox="0 0 720 72" role="img" aria-label="${label}">${drawn}</svg>`;
}

/** A year's days by their dates (YYYY-MM-DD), a column a week. */
export function calendar(year: string, days: [day: string, cell: Cell][]): Markup {
  const start = Date.parse(`${year}-01-01`);
  const place = (day: string): number =>
    (Date.parse(day) - start) / 86_400_000 + ((new Date(start).getUTCDay() + 6) % 7);
  const drawn = days.map(([day, cell]) => {
    const [week, weekday] = [Math.floor(place(day) / 7), place(day) % 7];
    return draw(cell, 26 + 12 * week, 24 + 12 * weekday, 10, 0.2 + 0.8 * cell.share);
  });
  const months = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split(" ").map((name, at) => {
    const first = `${year}-${String(at + 1).padStart(2, "0")}-01`;
    return html`<text x="${26 + 12 * Math.floor(place(first) / 7)}" y="9">${name}</text>`;
  });
  return html`<svg class="calendar" viewBox="0 0 664 100" role="img" aria-label="The archive of ${year}">
    <text x="0" y="9">${year}</text>${months}${drawn}</svg>`;
}

/** A line of values, the newest at the right. */
export function sparkline(values: number[]): Markup {
  const [most, least] = [Math.max(...values), Math.min(...values)];
  const y = (value: number): number => (most === least ? 12 : Math.round(22 - (20 * (value - least)) / (most - least)));
  const points = values.map((value, at) => `${Math.round((110 * at) / Math.max(1, values.length - 1))},${y(value)}`);
  const title = values.map((value) => value.toLocaleString("en-US")).join(", ");
  return html`<svg class="spark" viewBox="0 0 112 24" role="img" aria-label="Rows: ${title}"><title>${title}</title>
    <polyline points="${points.join(" ")}"/><circle cx="110" cy="${y(values.at(-1) ?? 0)}" r="2"/></svg>`;
}
