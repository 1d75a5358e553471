// Columns sort at a click: up, down, and as they were. Boxes that are too wide say so.
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  const rows = [...body.rows];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    const compare = (one, other) => {
      const [a, b] = [one, other].map((row) => row.cells[column]);
      const [x, y] = [a, b].map((cell) => parseFloat(cell.dataset.value));
      if (isNaN(x) && isNaN(y)) return a.textContent.localeCompare(b.textContent);
      return x - y;
    };
    const told = (row) => row.cells[column].textContent !== "–";
    button.addEventListener("click", () => {
      const next = { ascending: "descending", descending: null }[head.getAttribute("aria-sort")];
      const way = next === undefined ? "ascending" : next;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      if (way === null) return body.append(...rows);
      head.setAttribute("aria-sort", way);
      const sign = way === "ascending" ? 1 : -1;
      const figure = (row) => "value" in row.cells[column].dataset;
      // What is missing comes last either way, and words after figures.
      const rank = (row) => (told(row) ? (figure(row) ? 0 : 1) : 2);
      body.append(...[...rows].sort((a, b) => rank(a) - rank(b) || sign * compare(a, b)));
    });
  });
}
const look = (box) =>
  box.parentElement.classList.toggle(
    "more", box.scrollWidth - box.clientWidth - box.scrollLeft > 1);
const watch = new ResizeObserver((seen) => seen.forEach((entry) => look(entry.target)));
for (const box of document.querySelectorAll(".scroll")) {
  box.addEventListener("scroll", () => look(box), { passive: true });
  watch.observe(box);
}
