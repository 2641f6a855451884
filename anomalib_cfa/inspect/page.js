"use strict";
// The page: thresholds, grid, and the state in the URL's fragment.

const element = (id) => document.getElementById(id);
const SIDES = ["image", "pixel"];
const BINS = 50;
const defaults = {
  image: data.thresholds.image, pixel: data.thresholds.pixel, sort: "score", show: "", kind: "", folder: "", word: "",
  heats: false, open: "", strength: 0.6, outline: true, truth: true,
};
const state = { ...defaults };
let order = []; // indices of the images shown
let cursor = 0;

function readFragment() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const [name, value] of Object.entries(defaults)) {
    const text = given.get(name);
    if (text === null) state[name] = value;
    else if (typeof value === "number") {
      state[name] = Number.isFinite(parseFloat(text)) ? Math.min(Math.max(parseFloat(text), 0), 1) : value;
    } else state[name] = typeof value === "boolean" ? text === "1" : text;
  }
}

function writeFragment() {
  const changed = new URLSearchParams();
  for (const [name, value] of Object.entries(defaults)) {
    if (state[name] !== value) changed.set(name, typeof value === "boolean" ? +state[name] : state[name]);
  }
  history.replaceState(null, "", changed.size ? `#${changed}` : location.pathname + location.search);
}

const percent = (part, whole) => whole ? `${(100 * part / whole).toFixed(part && part / whole < 0.001 ? 3 : 1)} %` : "–";

function drawHistogram(side, bins) {
  const most = Math.max(1e-9, ...bins.normal, ...bins.defective, ...bins.unknown);
  const bar = (kind, up) => bins[kind].map((count, place) => {
    const height = count ? Math.max(48 * count / most, 1) : 0;
    return `<rect class="${kind}" x="${place * 2}" y="${up ? 50 - height : 50}" width="1.8" height="${height}"/>`;
  }).join("");
  element(`${side}-histogram`).innerHTML = `<svg viewBox="0 0 ${2 * BINS} 100" preserveAspectRatio="none" role="img" ` +
    `aria-label="Histogram of scores: normal upwards, defective downwards">${bar("unknown", true)}${bar("normal", true)}` +
    `${bar("defective", false)}<line class="axis" x1="0" x2="100" y1="50" y2="50"/><line class="at" y1="0" y2="100"/></svg>`;
  for (const kind of Object.keys(bins)) {
    document.querySelector(`#${side}-card .key .${kind}`).hidden = !bins[kind].some(Boolean);
  }
}

function showCounts(side) {
  const threshold = state[side], counts = side === "image" ? imageCounts(threshold) : pixelCounts(threshold);
  const line = document.querySelector(`#${side}-histogram .at`);
  line.setAttribute("x1", 100 * threshold);
  line.setAttribute("x2", 100 * threshold);
  const found = counts.defective - counts.missed;
  const many = (count, of) => side === "image" ? `${count} of ${of}` : percent(count, of);
  const facts = counts.defective + counts.normal ? [
    ["missed", many(counts.missed, counts.defective)], ["false alarms", many(counts.alarms, counts.normal)],
    ["precision", percent(found, found + counts.alarms)], ["recall", percent(found, counts.defective)],
  ] : [["over the threshold", many(counts.positive, counts.unknown)]];
  element(`${side}-counts`).replaceChildren(...facts.flatMap(([name, value]) => {
    const term = document.createElement("dt"), fact = document.createElement("dd");
    term.textContent = name;
    fact.textContent = value;
    fact.dataset.fact = name;
    return [term, fact];
  }));
  element(`${side}-found`).textContent = percent(counts.alarms, counts.normal);
}

function exportLine() {
  const path = data.checkpoint ?? "MODEL.ckpt";
  const quoted = data.windows ? `"${path}"` : /^[\w./-]+$/.test(path) ? path : `'${path.replaceAll("'", "'\\''")}'`;
  return `python -m anomalib_cfa.inspect.thresholds ${quoted} --image ${state.image} --pixel ${state.pixel}\n` +
    `anomalib export --model Cfa --ckpt_path ${quoted} --export_type openvino`;
}

function choose() {
  const word = state.word.toLowerCase();
  order = images.map((_, index) => index).filter((index) => {
    const image = images[index], { positive, error } = verdict(image, state.image);
    const wanted = { "": true, wrong: error !== "", positive, negative: !positive }[state.show] ?? error === state.show;
    return wanted && (!state.kind || image.kind === state.kind) && (!state.folder || image.folder === state.folder) &&
      image.name.toLowerCase().includes(word);
  });
  const keys = {
    score: (image) => -image.score, rising: (image) => image.score, wrong: (image) => -wrongness(image, state.image),
  };
  const key = keys[state.sort]; // by name they are already
  if (key) order.sort((one, other) => key(images[one]) - key(images[other]) || one - other);
  cursor = Math.min(cursor, Math.max(order.length - 1, 0));
  element("shown").textContent = `${order.length} of ${images.length}`;
}

// Only the tiles in sight exist.
const tiles = new Map();
function layout() {
  const grid = element("grid"), columns = Math.max(2, Math.floor((grid.clientWidth + 8) / 158));
  const width = (grid.clientWidth + 8) / columns, height = width + 38;
  return { columns, width, height };
}

function drawGrid() {
  const grid = element("grid"), { columns, width, height } = layout();
  const top = -grid.getBoundingClientRect().top, rows = Math.ceil(order.length / columns);
  grid.style.height = `${Math.max(rows * height, 60)}px`;
  const first = Math.max(0, Math.floor(top / height) - 1), last = Math.ceil((top + innerHeight) / height) + 1;
  const seen = new Set(order.slice(first * columns, last * columns));
  for (const [index, tile] of tiles) if (!seen.has(index)) { tile.remove(); tiles.delete(index); }
  for (let place = first * columns; place < Math.min(last * columns, order.length); place++) {
    const index = order[place], tile = tiles.get(index) ?? newTile(index), { error } = verdict(images[index], state.image);
    tile.className = `tile ${error}`;
    tile.style.cssText = `width:${width - 8}px;height:${height - 8}px;` +
      `transform:translate(${(place % columns) * width}px,${Math.floor(place / columns) * height}px)`;
    tile.dataset.place = place;
    tile.setAttribute("aria-selected", place === cursor);
    tile.querySelector(".badge").textContent = { alarm: "false alarm", missed: "missed", "": images[index].kind }[error];
    tile.querySelector("canvas").hidden = !state.heats;
    if (state.heats && !tile.painted) paintTile(tile, images[index]);
  }
}

function newTile(index) {
  const image = images[index], tile = document.createElement("div");
  tile.innerHTML = '<span class="shot"><img alt="" decoding="async"><canvas hidden></canvas></span>' +
    '<span class="score"><span class="value"></span><span class="badge"></span></span><span class="name"></span>';
  tile.setAttribute("role", "option");
  tile.title = image.name;
  tile.id = `tile-${index}`;
  tile.querySelector("img").src = image.thumbnail;
  tile.querySelector(".value").textContent = image.score.toFixed(4);
  tile.querySelector(".name").textContent = image.name;
  tile.addEventListener("click", () => { cursor = +tile.dataset.place; openViewer(order[cursor]); });
  tiles.set(index, tile);
  element("grid").append(tile);
  return tile;
}

async function paintTile(tile, image) {
  tile.painted = true;
  paintHeat(tile.querySelector("canvas"), await readGrey(image.small_map), 0.6);
}

let waiting = false;
function gridSoon() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; drawGrid(); });
}

function update() {
  for (const side of SIDES) {
    element(`${side}-slider`).value = state[side];
    if (document.activeElement !== element(`${side}-threshold`)) element(`${side}-threshold`).value = state[side];
    showCounts(side);
  }
  for (const name of ["sort", "show", "kind", "folder", "word"]) element(name).value = state[name];
  element("heats").checked = state.heats;
  element("line").textContent = exportLine();
  choose();
  gridSoon();
  updateViewer();
  writeFragment();
}

const set = (changes) => { Object.assign(state, changes); update(); };

function setThreshold(side, value) {
  const threshold = Math.min(Math.max(parseFloat(value), 0), 1);
  if (!Number.isNaN(threshold)) set({ [side]: +threshold.toFixed(side === "image" ? 4 : 3) });
}

function move(step) {
  if (!order.length) return;
  cursor = Math.min(Math.max(cursor + step, 0), order.length - 1);
  const { columns, height } = layout(), grid = element("grid").getBoundingClientRect();
  const top = grid.top + Math.floor(cursor / columns) * height;
  if (top < 0) scrollBy(0, top - 8);
  else if (top + height > innerHeight) scrollBy(0, top + height - innerHeight);
  drawGrid();
  element("grid").setAttribute("aria-activedescendant", `tile-${order[cursor]}`);
}
