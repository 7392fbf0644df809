"use strict";
// Pages, filters, sorts and enlarges the items embedded in the page. Text enters the document as text only, never as markup.
const data = JSON.parse(document.getElementById("items").textContent);
const at = (id) => document.getElementById(id);
const dialog = at("enlarged");
const state = { view: "all", tag: "", text: "", scorer: data.scorers[0] ?? "", order: "suite", page: 0, maps: at("maps")?.checked ?? false };
let visible = [];
let opened = -1; // position in `visible`

function make(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const format = (x) => (x === null || x === undefined ? "–" : x.toFixed(Math.abs(x) < 10 ? 3 : 1).replace("-", "−"));
const formatPart = (x) => (typeof x !== "number" ? JSON.stringify(x) : Number.isInteger(x) ? String(x) : format(x));
const isPair = data.models.length === 2;
const original = (cell, column) => cell.source ?? `${data.originals[column]}/${cell.sha.slice(0, 2)}/${cell.sha}.png`;
const hasFailed = (item) => item.cells.some((cell) => cell.failures.length > 0);

// What filters and orders go by: the chosen scorer's value, or the second model's gain over the first; larger is better.
function measure(item) {
  const values = item.cells.map((cell) => cell.scores[state.scorer]?.value ?? null);
  if (values.includes(null)) return null;
  return (data.lower.includes(state.scorer) ? -1 : 1) * (isPair ? values[1] - values[0] : values[0]);
}

// The lowest tenth and all that tie with it, but nothing that already has the best value.
function isWorst() {
  const values = data.items.map(measure).filter((x) => x !== null).sort((a, b) => a - b);
  const limit = values[Math.ceil(values.length / 10) - 1];
  return (item) => measure(item) !== null && measure(item) <= limit && measure(item) < values[values.length - 1];
}

const views = {
  all: () => () => true,
  failed: () => hasFailed,
  worst: isWorst,
  wins: () => (item) => measure(item) > 0,
  losses: () => (item) => measure(item) < 0, // null is not below zero
  ties: () => (item) => measure(item) === 0,
};
const last = (x, end) => (x === null || x === undefined ? end : x);
const orders = {
  suite: null,
  worst: (a, b) => last(measure(a), Infinity) - last(measure(b), Infinity) || 0,
  best: (a, b) => last(measure(b), -Infinity) - last(measure(a), -Infinity) || 0,
  spread: (a, b) => last(b.spread, -1) - last(a.spread, -1),
};

function picture(cell, column, isLarge) {
  if (!cell.sha || cell.lost) {
    const failure = cell.failures[0];
    const words = cell.answer ?? cell.lost ?? (failure ? `${failure.stage} ${failure.kind}` : "no image");
    return make("div", { className: cell.answer ? "hole answer" : "hole", textContent: words });
  }
  const thumbnail = `thumbnails/${cell.sha.slice(0, 2)}/${cell.sha}.webp`;
  const image = img(cell, isLarge ? original(cell, column) : (state.maps && cell.maps?.[state.scorer]) || thumbnail);
  if (isLarge) image.addEventListener("error", () => { image.src = thumbnail; }, { once: true });
  return image;
}

function img(cell, src) {
  const element = make("img", { className: cell.tiny ? "picture tiny" : "picture", loading: "lazy", decoding: "async", alt: "" });
  element.src = src;
  return element;
}

// What earned each score: the image under the scorer's heat map.
function heatMaps(cell) {
  const figures = Object.entries(cell.maps ?? {}).map(([scorer, src]) =>
    make("figure", {}, img(cell, src), make("figcaption", { textContent: `${scorer} ${format(cell.scores[scorer]?.value)}` })));
  return figures.length ? make("div", { className: "cells maps" }, ...figures) : null;
}

function card(item, position) {
  const cells = item.cells.map((cell, column) => {
    const score = cell.scores[state.scorer];
    const value = make(score ? "b" : "span", { textContent: score ? format(score.value) : cell.failures[0]?.kind ?? "–" });
    if (!score && cell.failures.length) value.className = "bad";
    const side = make("span", { textContent: isPair ? data.models[column] : item.tags[0] ?? "" });
    return make("span", { className: "cell" }, picture(cell, column, false), make("span", { className: "facts" }, side, value));
  });
  const words = make("span", { className: "words", textContent: item.prompt });
  const button = make("button", { className: "card", title: item.id }, make("span", { className: "cells" }, ...cells), words);
  button.addEventListener("click", () => open(position));
  return button;
}

// Lines of [name, value, class]; those without a value are left out.
function table(lines) {
  return make("table", { className: "compact key-value" }, ...lines.filter(([, value]) => value !== undefined && value !== "").map(
    ([name, value, kind = ""]) => make("tr", {}, make("td", { className: kind, textContent: name }), make("td", { className: kind, textContent: value }))));
}

function report(cell, column) {
  const failures = cell.failures.map((hole) => [hole.scorer || hole.stage, `${hole.kind}: ${hole.message}`, "bad"]);
  const scores = Object.entries(cell.scores).flatMap(([scorer, score]) => [
    table([[scorer, format(score.value), "big"], ...Object.entries(score.parts ?? {}).map(([name, value]) => [name, formatPart(value), "part"])]),
    score.detail ? make("pre", { textContent: score.detail }) : null]);
  return make("div", {}, isPair ? make("h3", { textContent: data.models[column] }) : null, failures.length ? table(failures) : null, ...scores);
}

function facts(item) {
  const cells = item.cells.map((cell, column) => {
    const link = cell.sha && !cell.lost ? original(cell, column) : null;
    return link && make("a", { href: link, textContent: isPair ? `original of ${data.models[column]}` : "original image" });
  });
  const [first] = item.cells;
  const lines = [["tags", item.tags.join(", ")], ["seed", item.seed], [data.called ?? "request", item.id], ["size", first.size], ["seconds", first.seconds?.toString()]];
  return make("div", {}, table(lines), make("p", { className: "note links" }, ...cells));
}

function open(position) {
  const item = visible[position];
  opened = position;
  const pictures = make("div", { className: "cells" }, ...item.cells.map((cell, column) => picture(cell, column, true)));
  const reports = make("div", { className: "cells" }, ...item.cells.map(report));
  at("body").replaceChildren(make("div", {}, pictures, ...item.cells.map(heatMaps)), make("div", {}, make("p", { className: "words", textContent: item.prompt }), reports, facts(item)));
  at("position").textContent = `${position + 1} of ${visible.length}`;
  at("before").disabled = position === 0;
  at("after").disabled = position === visible.length - 1;
  history.replaceState(null, "", `#${encodeURIComponent(item.id)}`);
  if (!dialog.open) dialog.showModal();
}

function show() {
  const words = state.text.toLowerCase().split(/\s+/).filter(Boolean);
  const isInView = views[state.view]();
  visible = data.items.filter((item) => (!state.tag || item.tags.includes(state.tag)) && isInView(item)
    && words.every((word) => item.prompt.toLowerCase().includes(word) || item.id.toLowerCase().includes(word)));
  if (orders[state.order]) visible.sort(orders[state.order]);
  const pages = Math.max(1, Math.ceil(visible.length / data.pageSize));
  state.page = Math.min(state.page, pages - 1);
  const start = state.page * data.pageSize;
  const cards = visible.slice(start, start + data.pageSize).map((item, offset) => card(item, start + offset));
  at("grid").replaceChildren(...(cards.length ? cards : [make("p", { className: "empty", textContent: "Nothing here fits these filters." })]));
  at("count").textContent = cards.length ? `${start + 1}–${start + cards.length} of ${visible.length}` : "0";
  at("previous").disabled = state.page === 0;
  at("next").disabled = state.page === pages - 1;
  for (const button of document.querySelectorAll("[data-view]")) button.setAttribute("aria-pressed", button.dataset.view === state.view);
}

function fragment() {
  try {
    return decodeURIComponent(location.hash.slice(1));
  } catch { // an address that was cut while it was copied
    return "";
  }
}

// The address after '#' is a view (#failed) or an item's id; an item outside the filters clears them.
function follow() {
  const target = fragment();
  if (Object.hasOwn(views, target)) return change({ view: target });
  if (!target) return undefined;
  if (!visible.some((item) => item.id === target)) {
    for (const id of ["tag", "text"]) if (at(id)) at(id).value = "";
    change({ view: "all", tag: "", text: "" });
  }
  const position = visible.findIndex((item) => item.id === target);
  if (position < 0) return undefined;
  turnTo(position);
  return open(position);
}

function change(changes) { Object.assign(state, { page: 0 }, changes); show(); }
function turn(page) { state.page = page; show(); }
function turnTo(position) { const page = Math.floor(position / data.pageSize); if (page !== state.page) turn(page); }
function step(by) { if (visible[opened + by]) { turnTo(opened + by); open(opened + by); } }

for (const button of document.querySelectorAll("[data-view]")) button.addEventListener("click", () => change({ view: button.dataset.view }));
for (const id of ["tag", "text", "scorer", "order"]) at(id)?.addEventListener("input", (event) => change({ [id]: event.target.value }));
at("previous").addEventListener("click", () => { turn(state.page - 1); scrollTo(0, 0); });
at("next").addEventListener("click", () => { turn(state.page + 1); scrollTo(0, 0); });
at("before").addEventListener("click", () => step(-1));
at("after").addEventListener("click", () => step(1));
at("close").addEventListener("click", () => dialog.close());
at("maps")?.addEventListener("change", (event) => change({ maps: event.target.checked, page: state.page }));
at("reveal")?.addEventListener("change", (event) => document.body.classList.toggle("revealed", event.target.checked));
dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
dialog.addEventListener("close", () => history.replaceState(null, "", location.pathname + location.search));
dialog.addEventListener("keydown", (event) => { if (event.key === "ArrowLeft") step(-1); else if (event.key === "ArrowRight") step(1); });
addEventListener("hashchange", follow);
show();
follow();
