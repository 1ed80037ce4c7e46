// Resizes an image to the model's size like the service: antialiased bilinear interpolation as in Pillow
// (libImaging/Resample.c), columns first, rounded after each pass.

const HEAD_BYTES = 21; // of a WebP file, up to and including its flags
const STRIP_PIXELS = 1 << 20; // read at once; bounds the memory, and the time that the page is blocked

/** Decode a file like the service: EXIF orientation applied, colour profile ignored. */
export async function decode(file) {
  const head = new Uint8Array(await file.slice(0, HEAD_BYTES).arrayBuffer());
  const text = new TextDecoder("latin1").decode(head);
  if (text.startsWith("RIFF") && text.slice(8, 16) === "WEBPVP8X" && (head[20] & 0x08) !== 0) {
    // The service applies a WebP's EXIF orientation, but not every browser does.
    throw new Error("this browser may not apply the EXIF orientation of a WebP file");
  }
  return createImageBitmap(file, { colorSpaceConversion: "none", imageOrientation: "from-image" });
}

/** Reduce (or enlarge) a bitmap to `width` x `height`, composited over white; returns an ImageData. */
export async function reduce(bitmap, width, height) {
  const columns = interpolation(bitmap.width, width);
  const rows = spread(interpolation(bitmap.height, height), bitmap.height);
  const sums = new Float64Array(width * height * 3);
  const line = new Uint8ClampedArray(width * 3);
  const step = Math.max(1, Math.floor(STRIP_PIXELS / bitmap.width));
  const canvas = document.createElement("canvas");
  canvas.width = bitmap.width;
  canvas.height = Math.min(step, bitmap.height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  for (let top = 0; top < bitmap.height; top += step) {
    const count = Math.min(step, bitmap.height - top);
    context.fillStyle = "white";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(bitmap, 0, -top);
    const { data } = context.getImageData(0, 0, bitmap.width, count);
    for (let y = 0; y < count; y += 1) {
      interpolateLine(data, y * bitmap.width * 4, columns, line);
      for (const { to, weight } of rows[top + y]) {
        for (let i = 0, sum = to * line.length; i < line.length; i += 1, sum += 1) {
          sums[sum] += weight * line[i];
        }
      }
    }
    await new Promise((resume) => setTimeout(resume)); // let the page handle events between strips
  }
  const image = new ImageData(width, height);
  for (let pixel = 0; pixel < width * height; pixel += 1) {
    image.data.set([sums[pixel * 3], sums[pixel * 3 + 1], sums[pixel * 3 + 2], 255], pixel * 4);
  }
  return image;
}

/** For each of `to` output positions: the first of `from` input positions that contributes, and the weights. */
function interpolation(from, to) {
  const scale = from / to;
  const support = Math.max(scale, 1);
  return Array.from({ length: to }, (_, place) => {
    const center = (place + 0.5) * scale;
    const first = Math.max(0, Math.floor(center - support + 0.5));
    const end = Math.min(from, Math.floor(center + support + 0.5));
    const weights = Array.from({ length: end - first }, (_, i) =>
      Math.max(0, 1 - Math.abs((first + i - center + 0.5) / support)),
    );
    const total = weights.reduce((sum, weight) => sum + weight, 0);
    return { first, weights: weights.map((weight) => weight / total) };
  });
}

/** The inverse: for each of `from` input positions, the output positions it contributes to. */
function spread(places, from) {
  const sources = Array.from({ length: from }, () => []);
  places.forEach(({ first, weights }, to) => {
    weights.forEach((weight, i) => sources[first + i].push({ to, weight }));
  });
  return sources;
}

function interpolateLine(data, start, columns, line) {
  columns.forEach(({ first, weights }, x) => {
    let red = 0;
    let green = 0;
    let blue = 0;
    for (let i = 0, at = start + first * 4; i < weights.length; i += 1, at += 4) {
      red += weights[i] * data[at];
      green += weights[i] * data[at + 1];
      blue += weights[i] * data[at + 2];
    }
    line[x * 3] = red;
    line[x * 3 + 1] = green;
    line[x * 3 + 2] = blue;
  });
}
