"use strict";
// What thresholds mean: verdicts, counts, histograms. No element of the page is touched here.

const data = JSON.parse(document.getElementById("data").textContent);
const images = data.images;
const PIXEL_STEPS = 1000; // data.pixels counts between the thresholds 0, 0.001, ..., 1; others count as the nearest

// The threshold as anomalib computes it, in float32 from its sensitivity.
const effective = (threshold) => Math.fround(1 - Math.fround(1 - threshold));

function verdict(image, threshold) {
  const positive = image.score > effective(threshold);
  if (image.defective === null) return { positive, error: "" };
  return { positive, error: positive === image.defective ? "" : positive ? "alarm" : "missed" };
}

function wrongness(image, threshold) {
  const beyond = image.score - effective(threshold);
  if (image.defective === null) return -Math.abs(beyond); // the nearest to the threshold first
  return image.defective ? -beyond : beyond;
}

function imageCounts(threshold) {
  const counts = { defective: 0, normal: 0, missed: 0, alarms: 0, positive: 0, unknown: 0 };
  for (const image of images) {
    const { positive, error } = verdict(image, threshold);
    counts.positive += positive;
    counts[image.defective === null ? "unknown" : image.defective ? "defective" : "normal"] += 1;
    counts.missed += error === "missed";
    counts.alarms += error === "alarm";
  }
  return counts;
}

const above = (bins, threshold) => {
  let sum = 0;
  for (let bin = Math.round(threshold * PIXEL_STEPS) + 1; bin < bins.length; bin++) sum += bins[bin];
  return sum;
};
const total = (bins) => bins.reduce((sum, count) => sum + count, 0);

function pixelCounts(threshold) {
  const { normal, defective, unknown } = data.pixels;
  const found = above(defective, threshold), alarms = above(normal, threshold);
  return {
    defective: total(defective), normal: total(normal), unknown: total(unknown),
    missed: total(defective) - found, alarms, positive: found + alarms + above(unknown, threshold),
  };
}

// The lowest threshold with at most this share of false alarms.
function imageThresholdFor(rate) {
  const normal = images.filter((image) => image.defective === false).map((image) => image.score).sort((a, b) => b - a);
  const allowed = Math.floor(rate * normal.length + 1e-9);
  if (!normal.length || allowed >= normal.length) return 0;
  let threshold = Math.ceil(normal[allowed] * 1e4) / 1e4;
  if (normal[allowed] > effective(threshold)) threshold += 1e-4;
  return Math.min(+threshold.toFixed(4), 1);
}

function pixelThresholdFor(rate) {
  const { normal } = data.pixels, allowed = rate * total(normal);
  let sum = 0;
  for (let bin = normal.length - 1; bin > 0; bin--) {
    sum += normal[bin];
    if (sum > allowed) return Math.min(bin / PIXEL_STEPS, 1);
  }
  return 0;
}

function imageBins(number) {
  const bins = { normal: Array(number).fill(0), defective: Array(number).fill(0), unknown: Array(number).fill(0) };
  for (const image of images) {
    const kind = image.defective === null ? "unknown" : image.defective ? "defective" : "normal";
    bins[kind][Math.min(number - 1, Math.floor(image.score * number))] += 1;
  }
  return bins;
}

function pixelBins(number) {
  const gather = (bins) => Array.from({ length: number }, (_, place) => {
    let sum = 0;
    const share = PIXEL_STEPS / number;
    for (let bin = place * share + 1; bin <= (place + 1) * share; bin++) sum += bins[bin];
    return Math.log1p(sum + (place ? 0 : bins[0])); // most pixels score low, and the few others matter
  });
  return Object.fromEntries(Object.entries(data.pixels).map(([kind, bins]) => [kind, gather(bins)]));
}

function asCsv(thresholds) {
  const quoted = (value) => `"${String(value).replaceAll('"', '""')}"`;
  const lines = ["name,kind,defective,score,image_threshold,called_defective,error"];
  for (const image of images) {
    const { positive, error } = verdict(image, thresholds.image);
    const known = image.defective === null ? "" : +image.defective;
    const word = error === "alarm" ? "false alarm" : error;
    lines.push([quoted(image.name), quoted(image.kind), known, image.score, thresholds.image, +positive, word].join(","));
  }
  return lines.join("\r\n") + "\r\n";
}

// The regions over a level in a map of grey levels, largest first.
function regionsOf(levels, width, height, level) {
  const seen = new Uint8Array(levels.length), regions = [];
  for (let start = 0; start < levels.length; start++) {
    if (seen[start] || levels[start] <= level) continue;
    const region = { size: 0, peak: 0, place: start }, stack = [start];
    seen[start] = 1;
    while (stack.length) {
      const place = stack.pop(), x = place % width, y = (place - x) / width;
      region.size += 1;
      if (levels[place] > region.peak) { region.peak = levels[place]; region.place = place; }
      for (let row = Math.max(y - 1, 0); row <= Math.min(y + 1, height - 1); row++) {
        for (let column = Math.max(x - 1, 0); column <= Math.min(x + 1, width - 1); column++) {
          const next = row * width + column;
          if (!seen[next] && levels[next] > level) { seen[next] = 1; stack.push(next); }
        }
      }
    }
    regions.push(region);
  }
  return regions.sort((one, other) => other.size - one.size);
}

// The border of what lies over a level, as a path of an SVG.
function borderOf(levels, width, height, level) {
  const inside = (x, y) => x >= 0 && y >= 0 && x < width && y < height && levels[y * width + x] > level;
  const parts = [];
  for (let y = 0; y <= height; y++) {
    for (let x = 0; x <= width; x++) {
      if (inside(x, y) !== inside(x, y - 1)) parts.push(`M${x} ${y}h1`);
      if (inside(x, y) !== inside(x - 1, y)) parts.push(`M${x} ${y}v1`);
    }
  }
  return parts.join("");
}
