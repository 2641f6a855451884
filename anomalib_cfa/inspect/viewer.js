"use strict";
// One image opened: picture, heat map, outlines, regions and the reason.

const COLOURS = data.colours.map((hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)));
const fetched = {}; // maps of images, by the index that their file calls `heatMap` with
const arriving = {};
let shown = null; // { index, map, mask } of the image in view

// A page on the disk may not read files beside it, but may run them: each map is a call of this function.
function heatMap(index, map, mask) {
  fetched[index] = { map, mask };
  arriving[index]?.();
}

function fetchMap(index) {
  const image = images[index];
  if (image.map) return Promise.resolve(image);
  if (fetched[index]) return Promise.resolve(fetched[index]);
  return new Promise((resolve, reject) => {
    arriving[index] = () => resolve(fetched[index]);
    const script = document.createElement("script");
    script.onerror = reject;
    script.src = image.map_file;
    document.head.append(script);
    script.onload = () => script.remove();
  });
}

async function readGrey(address) {
  const picture = new Image();
  picture.src = address;
  await picture.decode();
  const canvas = new OffscreenCanvas(picture.naturalWidth, picture.naturalHeight);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(picture, 0, 0);
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
  return { levels: Uint8Array.from({ length: pixels.length / 4 }, (_, place) => pixels[4 * place]), width: canvas.width, height: canvas.height };
}

// One colour scale for all images; what scores low stays transparent.
function paintHeat(canvas, { levels, width, height }, strength) {
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d"), picture = context.createImageData(width, height);
  levels.forEach((level, place) => {
    picture.data.set(COLOURS[level], 4 * place);
    picture.data[4 * place + 3] = 255 * Math.min(1, strength * (0.15 + level / 140)) * (strength > 0);
  });
  context.putImageData(picture, 0, 0);
}

async function openViewer(index) {
  state.open = images[index].name;
  const image = images[index], viewer = element("viewer");
  if (!viewer.open) viewer.showModal();
  shown = { index };
  element("picture").src = image.picture;
  element("picture").alt = image.name;
  element("layers").style.setProperty("--ratio", image.width / image.height);
  element("heat").getContext("2d").clearRect(0, 0, element("heat").width, element("heat").height);
  element("outlines").replaceChildren();
  showReason(image);
  update();
  const { map, mask } = await fetchMap(index);
  const [levels, truth] = await Promise.all([readGrey(map), mask ? readGrey(mask) : null]);
  if (shown?.index !== index) return; // another one was opened meanwhile
  Object.assign(shown, { map: levels, mask: truth });
  updateViewer();
}

function showReason(image) {
  element("reason").hidden = element("spot").hidden = !image.reason;
  if (!image.reason) return;
  element("worst").src = image.reason.worst;
  element("nearest").src = image.reason.nearest;
  element("nearest-name").textContent = image.reason.name;
  const [x, y] = image.reason.place;
  element("spot").style.left = `${100 * x}%`;
  element("spot").style.top = `${100 * y}%`;
}

function addPath(classes, path) {
  for (const name of classes) {
    const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
    line.setAttribute("class", name);
    line.setAttribute("d", path);
    element("outlines").append(line);
  }
}

function showRegions(image, map) {
  const level = 255 * effective(state.pixel), scale = image.width * image.height / (map.width * map.height);
  const rows = regionsOf(map.levels, map.width, map.height, level).slice(0, 5).map((region, place) => {
    const row = document.createElement("tr");
    for (const text of [place + 1, Math.round(region.size * scale).toLocaleString("en"), (region.peak / 255).toFixed(3)]) {
      row.insertCell().textContent = text;
    }
    return row;
  });
  if (!rows.length) {
    rows.push(document.createElement("tr"));
    rows[0].insertCell().textContent = "none";
    rows[0].cells[0].colSpan = 3;
  }
  element("regions").tBodies[0].replaceChildren(...rows);
  return level;
}

function updateViewer() {
  if (!shown) return;
  const image = images[shown.index], { positive, error } = verdict(image, state.image);
  const place = order.indexOf(shown.index);
  element("position").textContent = place < 0 ? "not in the list" : `${place + 1} of ${order.length}`;
  element("viewer-name").textContent = image.name;
  element("verdict").className = error;
  element("verdict").innerHTML = "score <b></b>, called <b></b><span></span>";
  const [score, called] = element("verdict").querySelectorAll("b");
  score.textContent = image.score.toFixed(4);
  called.textContent = positive ? "defective" : "normal";
  const truth = image.defective === null ? "" : image.defective ? `, is defective (${image.kind})` : ", is normal";
  element("verdict").lastChild.textContent = truth + { alarm: ": a false alarm", missed: ": missed", "": "" }[error];
  element("strength").value = state.strength;
  element("viewer-pixel").value = state.pixel;
  element("outline").checked = state.outline;
  element("truth").checked = state.truth;
  element("truth-label").hidden = !image.has_mask;
  if (!shown.map) return;
  const { map, mask } = shown;
  if (shown.painted !== state.strength) paintHeat(element("heat"), map, shown.painted = state.strength);
  const level = showRegions(image, map);
  element("outlines").setAttribute("viewBox", `0 0 ${map.width} ${map.height}`);
  element("outlines").replaceChildren();
  if (mask && state.truth) addPath(["under", "true"], borderOf(mask.levels, mask.width, mask.height, 127));
  if (state.outline) addPath(["under", "found"], borderOf(map.levels, map.width, map.height, level));
}

function step(by) {
  const place = order.indexOf(shown.index);
  const next = place < 0 ? Math.min(cursor, order.length - 1) : place + by;
  if (next < 0 || next >= order.length) return;
  cursor = next;
  openViewer(order[next]);
}

function syncViewer() {
  const index = state.open ? images.findIndex((image) => image.name === state.open) : -1;
  if (index >= 0 && shown?.index !== index) {
    cursor = Math.max(order.indexOf(index), 0);
    openViewer(index);
  } else if (index < 0 && element("viewer").open) element("viewer").close();
}

function wireViewer() {
  const bar = element("colours").getContext("2d");
  COLOURS.forEach((colour, place) => { bar.fillStyle = `rgb(${colour})`; bar.fillRect(place, 0, 1, 1); });
  element("viewer").addEventListener("close", () => { shown = null; set({ open: "" }); element("grid").focus({ preventScroll: true }); move(0); });
  element("viewer").addEventListener("click", (event) => { if (event.target === element("viewer")) element("viewer").close(); });
  element("close").addEventListener("click", () => element("viewer").close());
  element("previous").addEventListener("click", () => step(-1));
  element("next").addEventListener("click", () => step(1));
  element("strength").addEventListener("input", (event) => set({ strength: +event.target.value }));
  for (const name of ["outline", "truth"]) element(name).addEventListener("change", (event) => set({ [name]: event.target.checked }));
}
