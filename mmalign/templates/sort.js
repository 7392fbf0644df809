"use strict";
// A click on a column's head sorts its table: numbers by value with empty cells last, words by the alphabet, a second click the other way.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => {
    const isNumber = head.classList.contains("number");
    const before = head.getAttribute("aria-sort");
    const isDescending = before ? before === "ascending" : isNumber;
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", isDescending ? "descending" : "ascending");
    const sign = isDescending ? -1 : 1;
    const worth = (row) => (isNumber ? Number(row.cells[column].dataset.value ?? NaN) : row.cells[column].textContent);
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [left, right] = [worth(a), worth(b)];
      if (!isNumber) return sign * left.localeCompare(right);
      if (Number.isNaN(left) || Number.isNaN(right)) return Number.isNaN(left) - Number.isNaN(right);
      return sign * (left - right);
    });
    table.tBodies[0].append(...rows);
  }));
}
