"use strict";
// Turns the volumes of a report. Draws meshes into canvases with a depth buffer, as
// surfaces.picture does, with the camera and the light that surfaces.LOOK gives; no WebGL, which
// many machines lack.

// Reads what pages._encoded writes.
function decode(text, steps) {
  const numbers = [];
  let value = 0, shift = 0;
  for (const byte of atob(text)) {
    value |= (byte.charCodeAt(0) & 127) << shift;
    shift += 7;
    if (byte.charCodeAt(0) > 127) continue;
    numbers.push(value);
    value = shift = 0;
  }
  const [vertexCount, faceCount] = numbers, firstFace = 2 + 3 * vertexCount;
  const place = [0, 0, 0];
  const vertices = Float32Array.from(numbers.slice(2, firstFace), (code, i) => {
    place[i % 3] += (code >>> 1) ^ -(code & 1);
    return place[i % 3] / steps;
  });
  let unseen = 0;
  const corner = (behind) => (behind === 0 ? unseen++ : unseen - behind);
  const faces = Uint32Array.from(numbers.slice(firstFace, firstFace + 3 * faceCount), corner);
  return { vertices, faces, normals: normals(vertices, faces) };
}

// Unit normals at the vertices: the mean over the faces, by area.
function normals(v, faces) {
  const total = new Float32Array(v.length);
  for (let f = 0; f < faces.length; f += 3) {
    const [a, b, c] = [3 * faces[f], 3 * faces[f + 1], 3 * faces[f + 2]];
    for (let k = 0; k < 3; k++) {
      const i = (k + 1) % 3, j = (k + 2) % 3;
      const across = (v[b + i] - v[a + i]) * (v[c + j] - v[a + j]) -
        (v[b + j] - v[a + j]) * (v[c + i] - v[a + i]);
      for (const corner of [a, b, c]) total[corner + k] += across;
    }
  }
  for (let i = 0; i < total.length; i += 3) total.set(unit(total.subarray(i, i + 3)), i);
  return total;
}

const unit = (a) => a.map((x) => x / (Math.hypot(a[0], a[1], a[2]) || 1));
const clip = (x) => Math.min(Math.max(x, 0), 1);

// Rows of `view`: right, up and towards the viewer. Returns RGBA pixels, `edge` in each direction.
function render(mesh, colour, look, view, edge) {
  const { vertices, normals, faces } = mesh;
  const light = unit(look.light), half = unit([light[0], light[1], light[2] + 1]);
  const body = [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));
  const s = new Float32Array(2 * vertices.length); // per vertex: x, y in pixels, depth, normal
  for (let i = 0; i < vertices.length; i += 3) {
    for (let k = 0; k < 3; k++) {
      const [a, b, c] = view[k];
      s[2 * i + k] = (a * vertices[i] + b * vertices[i + 1] + c * vertices[i + 2]) / look.reach;
      s[2 * i + 3 + k] = a * normals[i] + b * normals[i + 1] + c * normals[i + 2];
    }
    s[2 * i] = (1 + s[2 * i]) * edge / 2 - 0.5;
    s[2 * i + 1] = (1 - s[2 * i + 1]) * edge / 2 - 0.5;
  }
  const range = (a, b, c) => // of whole pixels
    [Math.max(Math.ceil(Math.min(a, b, c)), 0), Math.min(Math.floor(Math.max(a, b, c)), edge - 1)];
  const depth = new Float32Array(edge * edge).fill(-Infinity);
  const pixels = new Uint8ClampedArray(4 * edge * edge);
  for (let f = 0; f < faces.length; f += 3) {
    const a = 6 * faces[f], b = 6 * faces[f + 1], c = 6 * faces[f + 2];
    const bx = s[b] - s[a], by = s[b + 1] - s[a + 1], cx = s[c] - s[a], cy = s[c + 1] - s[a + 1];
    const area = bx * cy - cx * by;
    if (!(area < 0)) continue; // turned away
    const [left, right] = range(s[a], s[b], s[c]), [top, low] = range(s[a + 1], s[b + 1], s[c + 1]);
    for (let y = top; y <= low; y++) {
      for (let x = left; x <= right; x++) {
        const dx = x - s[a], dy = y - s[a + 1];
        const q = (dx * cy - cx * dy) / area, r = (bx * dy - dx * by) / area, p = 1 - q - r;
        if (p < -1e-6 || q < -1e-6 || r < -1e-6) continue;
        const at = y * edge + x, z = p * s[a + 2] + q * s[b + 2] + r * s[c + 2];
        if (z <= depth[at]) continue;
        depth[at] = z;
        const nx = p * s[a + 3] + q * s[b + 3] + r * s[c + 3];
        const ny = p * s[a + 4] + q * s[b + 4] + r * s[c + 4];
        const nz = p * s[a + 5] + q * s[b + 5] + r * s[c + 5];
        const n = Math.sqrt(nx * nx + ny * ny + nz * nz) || 1;
        const along = (d) => clip((nx * d[0] + ny * d[1] + nz * d[2]) / n);
        const shade = look.ambient + look.diffuse * along(light) + look.facing * clip(nz / n);
        const gloss = 255 * look.gloss * along(half) ** look.shine;
        for (let k = 0; k < 3; k++) pixels[4 * at + k] = shade * body[k] + gloss;
        pixels[4 * at + 3] = 255;
      }
    }
  }
  for (let at = 0; at < depth.length; at++) { // outlines: a neighbour lies far behind
    const x = at % edge, limit = depth[at] - look.step;
    if ((x > 0 && depth[at - 1] < limit) || (x < edge - 1 && depth[at + 1] < limit) ||
        depth[at - edge] < limit || depth[at + edge] < limit) {
      for (let k = 0; k < 3; k++) pixels[4 * at + k] *= look.edge;
    }
  }
  return pixels;
}

// One strip of volumes, which turn together.
function start(strip) {
  const look = JSON.parse(strip.dataset.look);
  const canvases = [...strip.querySelectorAll("canvas")];
  const meshes = new Map(), near = new Set(), stale = new Set(); // near: to what is on the screen
  let view = look.view, fineness = 2, due = 0, held = null;

  const draw = (canvas) => {
    if (!meshes.has(canvas)) {
      const holder = document.getElementById(canvas.dataset.mesh);
      meshes.set(canvas, decode(holder.dataset.triangles, look.steps));
    }
    const edge = Math.round(fineness * Math.min(canvas.clientWidth, 300)) || 1;
    if (canvas.width !== edge) canvas.width = canvas.height = edge;
    const pixels = render(meshes.get(canvas), canvas.dataset.colour, look, view, edge);
    canvas.getContext("2d").putImageData(new ImageData(pixels, edge), 0, 0);
  };
  const redraw = () => {
    due ||= requestAnimationFrame(() => {
      due = 0;
      const begun = performance.now();
      stale.forEach((canvas) => near.has(canvas) && draw(canvas));
      stale.clear();
      if (held && performance.now() - begun > 40) fineness = 1; // coarse while it moves, if slow
    });
  };
  const show = (seen) => {
    view = seen;
    near.forEach((canvas) => stale.add(canvas));
    redraw();
  };
  // Turns by angles about the screen's upward axis and its axis to the right.
  const turn = (across, down) => {
    const mix = (a, b, angle) => a.map((x, i) => x * Math.cos(angle) + b[i] * Math.sin(angle));
    const [right, up, viewer] = view;
    const turned = mix(viewer, right, -across);
    show([mix(right, viewer, across), mix(up, turned, -down), mix(turned, up, down)]);
  };
  const keys = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

  strip.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.key === "Home") show(look.view);
    else if (event.key in keys) turn(...keys[event.key].map((k) => k * Math.PI / 18));
    else return;
    event.preventDefault();
  });
  for (const canvas of canvases) {
    canvas.addEventListener("dblclick", () => show(look.view));
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      canvas.setPointerCapture(event.pointerId);
      held = event;
    });
    canvas.addEventListener("pointermove", (event) => {
      if (held?.pointerId !== event.pointerId) return;
      const scale = Math.PI / canvas.clientWidth; // half a turn from edge to edge
      turn((event.clientX - held.clientX) * scale, (event.clientY - held.clientY) * scale);
      held = event;
    });
    canvas.addEventListener("lostpointercapture", () => {
      held = null;
      fineness = 2;
      show(view);
    });
  }
  const observer = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) near.add(target), stale.add(target);
      else if (near.delete(target)) target.width = target.height = 0; // gives its memory back
    }
    redraw();
  }, { rootMargin: "200px" });
  strip.hidden = false;
  canvases.forEach((canvas) => observer.observe(canvas));
}

document.querySelectorAll(".volumes").forEach(start);
