"use strict";
// Wires the page's elements.

function fillSelect(id, values) {
  for (const value of [...new Set(values)].filter(Boolean).sort()) element(id).add(new Option(value, value));
  element(id).closest("label").hidden = element(id).options.length < 2;
}

function wireThresholds() {
  for (const side of SIDES) {
    element(`${side}-slider`).addEventListener("input", (event) => setThreshold(side, event.target.value));
    element(`${side}-threshold`).addEventListener("input", (event) => setThreshold(side, event.target.value));
    element(`${side}-threshold`).addEventListener("blur", update);
    element(`${side}-asked`).addEventListener("input", (event) => {
      const rate = parseFloat(event.target.value) / 100;
      if (rate >= 0 && rate <= 1) setThreshold(side, (side === "image" ? imageThresholdFor : pixelThresholdFor)(rate));
    });
    element(`${side}-histogram`).addEventListener("click", (event) => {
      const box = event.currentTarget.getBoundingClientRect();
      setThreshold(side, ((event.clientX - box.left) / box.width).toFixed(3));
    });
  }
  element("viewer-pixel").addEventListener("input", (event) => setThreshold("pixel", event.target.value));
  element("reset").addEventListener("click", () => set({ image: defaults.image, pixel: defaults.pixel }));
}

function wireTools() {
  for (const name of ["sort", "show", "kind", "folder", "word"]) {
    element(name).addEventListener("input", (event) => { cursor = 0; set({ [name]: event.target.value }); });
  }
  element("heats").addEventListener("change", (event) => set({ heats: event.target.checked }));
  element("tools").addEventListener("submit", (event) => event.preventDefault());
  element("theme").addEventListener("click", () => {
    const root = document.documentElement.style;
    const dark = root.colorScheme ? root.colorScheme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.colorScheme = dark ? "light" : "dark";
  });
  element("copy").addEventListener("click", async (event) => {
    getSelection().selectAllChildren(element("line"));
    try { await navigator.clipboard.writeText(exportLine()); } catch { document.execCommand("copy"); }
    event.target.textContent = "Copied";
    setTimeout(() => { event.target.textContent = "Copy"; }, 1500);
  });
  element("csv").addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([asCsv(state)], { type: "text/csv" }));
    link.download = "inspection.csv";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
}

function wireKeys() {
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.matches("input:not([type=checkbox]), select");
    const { columns } = layout(), viewing = element("viewer").open;
    const inViewer = {
      ArrowLeft: () => step(-1), ArrowRight: () => step(1), o: () => set({ outline: !state.outline }),
      m: () => set({ truth: !state.truth }), h: () => set({ strength: state.strength ? 0 : defaults.strength }),
    };
    const inGrid = {
      ArrowLeft: () => move(-1), ArrowRight: () => move(1), ArrowUp: () => move(-columns), ArrowDown: () => move(columns),
      Home: () => move(-order.length), End: () => move(order.length),
      Enter: () => order.length && openViewer(order[cursor]),
    };
    const grid = document.activeElement === element("grid");
    let action = viewing ? inViewer[event.key] : grid ? inGrid[event.key] : undefined;
    if (!viewing && event.key === "/") action = () => element("word").focus();
    if (action && !typing) { event.preventDefault(); action(); }
  });
}

fillSelect("kind", images.map((image) => image.kind));
if (images.some((image) => image.folder !== image.kind)) fillSelect("folder", images.map((image) => image.folder));
else element("folder").closest("label").hidden = true;
drawHistogram("image", imageBins(BINS));
drawHistogram("pixel", pixelBins(BINS));
wireThresholds();
wireTools();
wireViewer();
wireKeys();
addEventListener("scroll", gridSoon, { passive: true });
addEventListener("resize", gridSoon);
const follow = () => { readFragment(); update(); syncViewer(); };
addEventListener("hashchange", follow);
follow();
