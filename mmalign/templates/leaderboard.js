"use strict";
// Sorts tables by any column and, where the page has filters, hides rows; the choice is kept in the address, so a view can be linked.
const at = (id) => document.getElementById(id);
const filters = ["suite", "family", "size", "method", "origin", "text"].filter(at);

function show() {
  const chosen = Object.fromEntries(filters.map((name) => [name, at(name).value]));
  const words = chosen.text.toLowerCase().split(/\s+/).filter(Boolean);
  const withDeviating = at("deviating")?.checked ?? false;
  let total = 0;
  for (const board of document.querySelectorAll(".board")) {
    let count = 0;
    for (const row of board.querySelectorAll("tbody tr")) {
      const facts = row.dataset;
      const fits = ["family", "size", "method", "origin"].every((name) => !chosen[name] || facts[name] === chosen[name]);
      const text = `${row.cells[0].textContent} ${row.cells[1].textContent}`.toLowerCase();
      row.hidden = !fits || !words.every((word) => text.includes(word)) || (row.classList.contains("deviating") && !withDeviating);
      if (!row.hidden) count += 1;
    }
    board.hidden = count === 0 || (chosen.suite !== "" && board.dataset.suite !== chosen.suite);
    if (!board.hidden) total += count;
  }
  at("count").textContent = `${total} rows`;
  at("nothing").hidden = total > 0;
  const kept = new URLSearchParams(filters.filter((name) => chosen[name]).map((name) => [name, chosen[name]]));
  history.replaceState(null, "", kept.size ? `#${kept}` : location.pathname);
}

function sortBy(table, column) {
  const heads = [...table.tHead.rows[0].cells];
  const head = heads[column];
  const isNumber = head.classList.contains("number");
  const before = head.getAttribute("aria-sort");
  const isDescending = before ? before === "ascending" : isNumber && !head.textContent.includes("↓");
  for (const other of heads) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", isDescending ? "descending" : "ascending");
  const sign = isDescending ? -1 : 1;
  const worth = (row) => (isNumber ? Number(row.cells[column].dataset.value ?? NaN) : row.cells[column].textContent);
  const rows = [...table.tBodies[0].rows].sort((a, b) => {
    const [left, right] = [worth(a), worth(b)];
    if (!isNumber) return sign * left.localeCompare(right, undefined, { numeric: true });
    if (Number.isNaN(left) || Number.isNaN(right)) return Number.isNaN(left) - Number.isNaN(right);
    return sign * (left - right);
  });
  table.tBodies[0].append(...rows);
}

for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    head.querySelector("button")?.addEventListener("click", () => sortBy(table, column));
  });
}
for (const [name, value] of new URLSearchParams(location.hash.slice(1))) if (filters.includes(name)) at(name).value = value;
for (const name of filters) at(name).addEventListener("input", show);
at("deviating")?.addEventListener("input", show);
if (filters.length > 0) show();
