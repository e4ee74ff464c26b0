// Tables: a click on a heading sorts, a field filters, and long tables show their first rows until asked for all.
"use strict";
for (const table of document.querySelectorAll("table[data-top]")) {
  const body = table.tBodies[0];
  const rows = Array.from(body.rows);
  const top = Number(table.dataset.top);
  const tools = table.parentElement.previousElementSibling;
  const more = tools.querySelector("button");
  const field = tools.querySelector("input");
  let all = rows.length <= top;

  const show = () => {
    const words = field.value.toLowerCase();
    let shown = 0;
    for (const row of body.rows) {
      const found = row.cells[0].textContent.toLowerCase().includes(words);
      row.hidden = !found || (!all && !words && shown >= top);
      shown += row.hidden ? 0 : 1;
    }
    more.textContent = all ? `Show the first ${top}` : `Show all ${rows.length}`;
    more.setAttribute("aria-expanded", String(all));
    more.hidden = rows.length <= top || words !== "";
    tools.querySelector("output").textContent = `${shown} of ${rows.length} classes shown`;
  };

  const value = (row, column) => {
    const cell = row.cells[column];
    return "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent.trim().toLowerCase();
  };

  const sort = (heading, column) => {
    const numbers = "value" in rows[0].cells[column].dataset;
    const before = heading.getAttribute("aria-sort");
    const down = before === "none" ? numbers : before === "ascending";
    for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    const order = (one, other) => {
      const a = value(one, column), b = value(other, column);
      return numbers ? a - b : a.localeCompare(b, undefined, { numeric: true });
    };
    body.append(...rows.sort((one, other) => (down ? -order(one, other) : order(one, other))));
    show();
  };

  for (const [column, heading] of Array.from(table.tHead.rows[0].cells).entries()) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    if (!heading.hasAttribute("aria-sort")) heading.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => sort(heading, column));
  }
  more.addEventListener("click", () => { all = !all; show(); });
  field.addEventListener("input", show);
  tools.hidden = false;
  show();
}
