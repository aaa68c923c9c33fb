"use strict";
// Search and sorting of the queries, sorting of tables, modes. Everything that is shown is in the
// page already: nothing here makes markup of text.
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const list = document.querySelector(".queries");
const queries = list ? [...list.children] : [];
const texts = new Map();

function search(words) {
  const wanted = words.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const query of queries) {
    if (wanted.length && !texts.has(query)) texts.set(query, query.textContent.toLowerCase());
    query.hidden = !wanted.every((word) => texts.get(query).includes(word));
    shown += !query.hidden;
  }
  document.querySelector("#found").textContent =
    wanted.length ? `${shown} of ${queries.length} queries` : "";
}

// Rows in the order of a key: of numbers as numbers, of texts by the alphabet.
function sorted(rows, key, down) {
  const numeric = rows.every((row) => key(row) === "" || !Number.isNaN(Number(key(row))));
  const compare = numeric
    ? (a, b) => (key(a) === "" ? -Infinity : +key(a)) - (key(b) === "" ? -Infinity : +key(b))
    : (a, b) => key(a).localeCompare(key(b));
  return [...rows].sort((a, b) => (down ? -compare(a, b) : compare(a, b)));
}

for (const button of all(".sort button")) {
  button.addEventListener("click", () => {
    const turned = { up: "down", down: "up" }[button.dataset.way];
    const way = turned || button.dataset.first;
    for (const other of all(".sort button")) delete other.dataset.way;
    button.dataset.way = way;
    list.append(...sorted(queries, (query) => query.dataset[button.dataset.key], way === "down"));
  });
}

for (const table of all("table.sortable")) {
  const heads = all("thead th", table);
  heads.forEach((head, column) => {
    head.querySelector("button")?.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const body = table.tBodies[0];
      const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
      body.append(...sorted([...body.rows], key, down));
    });
  });
}

document.querySelector("#search")?.addEventListener("input", (event) => search(event.target.value));
document.querySelector("#open")?.addEventListener("click", (event) => {
  const open = event.target.getAttribute("aria-pressed") !== "true";
  event.target.setAttribute("aria-pressed", open);
  event.target.textContent = open ? "Close all" : "Open all";
  for (const query of queries) if (!query.hidden) query.querySelector("details").open = open;
});
document.querySelector("#letters")?.addEventListener("click", (event) => {
  const mono = event.target.getAttribute("aria-pressed") !== "true";
  event.target.setAttribute("aria-pressed", mono);
  document.documentElement.dataset.letters = mono ? "mono" : "serif";
});
document.querySelector("#mode").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.mode
    ? root.dataset.mode === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.mode = dark ? "light" : "dark";
});
// The tokens of a passage get their colours when it is first seen: a look and how many characters
// have it, one after the other.
function colour(passage) {
  const text = passage.textContent;
  let at = 0;
  const runs = [...passage.dataset.looks.matchAll(/([a-i])(\d*)/g)].map(([, look, count]) => {
    const run = document.createElement(look === "a" ? "span" : "i");
    run.className = ["", "p1", "p2", "p3", "p4", "n1", "n2", "n3", "n4"]["abcdefghi".indexOf(look)];
    run.textContent = text.slice(at, (at += Number(count || 1)));
    return run;
  });
  passage.replaceChildren(...runs);
  passage.removeAttribute("data-looks");
}
document.addEventListener("toggle", (event) => {
  for (const passage of all("[data-looks]", event.target)) colour(passage);
}, true);

// A link to a query opens it.
function follow() {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const details = target && target.querySelector(":scope > details");
  if (details) details.open = true;
}
addEventListener("hashchange", follow);
follow();
// j and k go from query to query, as in many lists.
document.addEventListener("keydown", (event) => {
  if (event.target.matches("input") || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/" && document.querySelector("#search")) {
    event.preventDefault();
    document.querySelector("#search").focus();
  }
  if (event.key !== "j" && event.key !== "k") return;
  const heads = all(".queries > li:not([hidden]) > details > summary");
  const at = heads.indexOf(document.activeElement);
  heads[Math.min(heads.length - 1, Math.max(0, at + (event.key === "j" ? 1 : -1)))]?.focus();
});
