'use strict'
// A CT in three linked planes. Voxels lie as (slice, row, column): slices from the feet up, rows from
// the front back, columns from the patient's right to the left.
const $ = id => document.getElementById(id)
const scan = JSON.parse($('data').textContent)
const [nz, ny, nx] = scan.shape, [dz, dy, dx] = scan.mm
const size = [nz, ny, nx], grey = new Uint8Array(nz*ny*nx), at = [...scan.first]
const windows = {lung: [-1350, 150], mediastinum: [-160, 240]}
const colors = [[1, '#56B4E9'], [2, '#CC79A7'], [4, '#F0A010']]  // right lung, left lung, lesion
let labels = null, chosen = 'lung', overlay = .6

const planes = {  // axis that is scrolled, those across and down, voxel sizes, letters on the edges
  axial:    {axis: 0, across: 2, down: 1, mm: [dx, dy], up: false, edges: ['R', 'L', 'A', 'P']},
  coronal:  {axis: 1, across: 2, down: 0, mm: [dx, dz], up: true, edges: ['R', 'L', 'H', 'F']},
  sagittal: {axis: 2, across: 1, down: 0, mm: [dy, dz], up: true, edges: ['A', 'P', 'H', 'F']}}

const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0))

function toHU(level) {
  const x = scan.level, y = scan.hu
  let i = 0
  while (i < x.length-2 && level > x[i+1]) i++
  return y[i]+(level-x[i])*(y[i+1]-y[i])/(x[i+1]-x[i])
}

function shades() {
  const [low, high] = windows[chosen]
  return Uint8Array.from({length: 256}, (_, i) => 255*Math.min(1, Math.max(0, (toHU(i)-low)/(high-low))))
}

function cut(p, volume) {  // the plane p of a volume, width × height
  const w = size[p.across], h = size[p.down], stride = [ny*nx, nx, 1], out = new Uint8Array(w*h)
  for (let v = 0; v < h; v++) {
    let o = at[p.axis]*stride[p.axis]+(p.up ? h-1-v : v)*stride[p.down]
    for (let u = 0; u < w; u++, o += stride[p.across]) out[v*w+u] = volume[o]
  }
  return [out, w, h]
}

function outline(g, mask, bit, w, h, sx, sy) {  // the borders between voxels inside and outside
  const inside = (u, v) => u >= 0 && v >= 0 && u < w && v < h &&
    (bit === 4 ? mask[v*w+u] & 4 : (mask[v*w+u] & 3) === bit)
  g.beginPath()
  for (let v = 0; v <= h; v++) for (let u = 0; u <= w; u++) {
    const here = !!inside(u, v)
    if (here !== !!inside(u-1, v)) { g.moveTo(u*sx, v*sy); g.lineTo(u*sx, (v+1)*sy) }
    if (here !== !!inside(u, v-1)) { g.moveTo(u*sx, v*sy); g.lineTo((u+1)*sx, v*sy) }
  }
  g.stroke()
}

function letters(g, p, W, H, ratio) {
  g.font = `600 ${13*ratio}px system-ui, sans-serif`
  g.lineWidth = 3*ratio; g.strokeStyle = '#000'; g.fillStyle = '#fff'; g.textBaseline = 'middle'
  const [left, right, top, bottom] = p.edges, gap = 12*ratio
  for (const [t, x, y] of [[left, gap, H/2], [right, W-gap, H/2], [top, W/2, gap], [bottom, W/2, H-gap]]) {
    g.textAlign = 'center'; g.strokeText(t, x, y); g.fillText(t, x, y)
  }
}

const scratch = document.createElement('canvas')
function draw(name) {
  const p = planes[name], canvas = $(name), ratio = window.devicePixelRatio || 1
  const [pixels, w, h] = cut(p, grey), shade = shades()
  const tall = h*p.mm[1]/(w*p.mm[0])
  canvas.style.aspectRatio = `${1/tall}`
  const W = canvas.width = Math.round(canvas.clientWidth*ratio) || w, H = canvas.height = Math.round(W*tall)
  const image = new ImageData(w, h)
  for (let i = 0; i < w*h; i++) {
    image.data[4*i] = image.data[4*i+1] = image.data[4*i+2] = shade[pixels[i]]; image.data[4*i+3] = 255
  }
  scratch.width = w; scratch.height = h; scratch.getContext('2d').putImageData(image, 0, 0)
  const g = canvas.getContext('2d')
  g.imageSmoothingQuality = 'high'; g.drawImage(scratch, 0, 0, W, H)
  if (labels && overlay > 0) {
    const [mask] = cut(p, labels)
    for (let i = 0; i < w*h; i++) {
      const on = mask[i] & 4
      image.data[4*i] = 240; image.data[4*i+1] = 160; image.data[4*i+2] = 16
      image.data[4*i+3] = on ? 110*overlay : 0
    }
    scratch.getContext('2d').putImageData(image, 0, 0)
    g.imageSmoothingEnabled = false; g.drawImage(scratch, 0, 0, W, H); g.imageSmoothingEnabled = true
    g.globalAlpha = Math.min(1, .3+overlay)
    for (const [bit, color] of colors) {
      g.strokeStyle = color; g.lineWidth = (bit === 4 ? 1.6 : 1.1)*ratio
      outline(g, mask, bit, w, h, W/w, H/h)
    }
    g.globalAlpha = 1
  }
  const x = (at[p.across]+.5)*W/w, y = ((p.up ? h-1-at[p.down] : at[p.down])+.5)*H/h
  g.strokeStyle = 'rgba(255,255,255,.45)'; g.lineWidth = ratio; g.setLineDash([4*ratio, 5*ratio])
  g.beginPath(); g.moveTo(x, 0); g.lineTo(x, H); g.moveTo(0, y); g.lineTo(W, y); g.stroke(); g.setLineDash([])
  letters(g, p, W, H, ratio)
}

const words = {axial: 'slice', coronal: 'row', sagittal: 'column'}
let lesion = 0

function show() {
  for (const [name, p] of Object.entries(planes)) {
    const slider = $(name+'-at'), i = at[p.axis]
    slider.value = i
    const own = scan.lesions.length && scan.lesions[lesion].every((v, axis) => v === at[axis])
    $(name+'-where').textContent = `${own && name === 'axial' ? `lesion ${lesion+1}, ` : ''}${words[name]} ${scan.voxels[p.axis][i]} of 0–${scan.last[p.axis]}`
    draw(name)
  }
}

function go(axis, i) {
  at[axis] = Math.min(size[axis]-1, Math.max(0, Math.round(i)))
  show()
}

function place(p, canvas, e) {  // look where the pointer is
  const box = canvas.getBoundingClientRect(), w = size[p.across], h = size[p.down]
  const u = Math.floor((e.clientX-box.left)/box.width*w), v = Math.floor((e.clientY-box.top)/box.height*h)
  at[p.across] = Math.min(w-1, Math.max(0, u))
  go(p.down, p.up ? h-1-v : v)
}

for (const [name, p] of Object.entries(planes)) {
  const canvas = $(name), slider = $(name+'-at')
  slider.max = size[p.axis]-1
  slider.addEventListener('input', () => go(p.axis, +slider.value))
  let turned = 0, from = null
  canvas.addEventListener('wheel', e => {
    e.preventDefault(); turned += e.deltaY
    const steps = Math.trunc(turned/30) || Math.sign(e.deltaY)*(Math.abs(e.deltaY) >= 4)
    if (steps) { turned = 0; go(p.axis, at[p.axis]-Math.sign(steps)*Math.min(3, Math.abs(steps))*(p.up ? -1 : 1)) }
  }, {passive: false})
  canvas.addEventListener('pointerdown', e => {
    canvas.setPointerCapture(e.pointerId); from = [e.clientX, at[p.axis], false]
    if (e.pointerType !== 'touch') place(p, canvas, e)
  })
  canvas.addEventListener('pointermove', e => {
    if (!from) return
    if (e.pointerType !== 'touch') { place(p, canvas, e); return }
    const far = e.clientX-from[0]  // a finger scrolls sideways, so that the page can still be moved up and down
    if (Math.abs(far) > 6) from[2] = true
    if (from[2]) go(p.axis, from[1]+far/4)
  })
  canvas.addEventListener('pointerup', e => {
    if (from && e.pointerType === 'touch' && !from[2]) place(p, canvas, e)
    from = null
  })
  canvas.addEventListener('pointercancel', () => { from = null })
}

function choose(name) {
  chosen = name
  for (const k of Object.keys(windows)) $('window-'+k).setAttribute('aria-pressed', k === name)
  show()
}
for (const k of Object.keys(windows)) $('window-'+k).addEventListener('click', () => choose(k))

$('overlay').addEventListener('input', e => { overlay = e.target.value/100; show() })

function jump(i) {
  lesion = (i+scan.lesions.length)%scan.lesions.length
  scan.lesions[lesion].forEach((v, axis) => { at[axis] = v })
  for (const b of document.querySelectorAll('[data-lesion]')) b.setAttribute('aria-pressed', +b.dataset.lesion === lesion)
  show()
}
for (const b of document.querySelectorAll('[data-lesion]')) {
  b.addEventListener('click', () => { jump(+b.dataset.lesion); $('viewer').scrollIntoView({block: 'nearest'}) })
}

document.addEventListener('keydown', e => {
  if (e.ctrlKey || e.metaKey || e.altKey || e.target.matches('input')) return
  const key = e.key.toLowerCase()
  if (key === 'arrowup') go(0, at[0]+1)
  else if (key === 'arrowdown') go(0, at[0]-1)
  else if (key === 'w') choose(chosen === 'lung' ? 'mediastinum' : 'lung')
  else if (key === 'o') { overlay = overlay ? 0 : .6; $('overlay').value = 100*overlay; show() }
  else if ((key === 'n' || key === 'p') && scan.lesions.length) jump(lesion+(key === 'n' ? 1 : -1))
  else return
  e.preventDefault()
})

new ResizeObserver(show).observe($('viewer'))
matchMedia('print').addEventListener('change', show)

async function load() {
  const c = new OffscreenCanvas(nx, ny), g = c.getContext('2d', {willReadFrequently: true})
  const one = async z => {
    const picture = await createImageBitmap(new Blob([bytes(scan.slices[z])], {type: 'image/jpeg'}))
    g.drawImage(picture, 0, 0)
    const rgba = g.getImageData(0, 0, nx, ny).data, o = z*ny*nx
    for (let i = 0; i < ny*nx; i++) grey[o+i] = rgba[4*i]
  }
  const stream = new Blob([bytes(scan.labels)]).stream().pipeThrough(new DecompressionStream('deflate'))
  labels = new Uint8Array(await new Response(stream).arrayBuffer())
  await one(at[0])
  if (scan.lesions.length) jump(0)
  else show()
  for (let z = 0; z < nz; z++) await one(z)
  show()
  $('viewer').dataset.ready = 'yes'
}
load().catch(e => { $('viewer-note').textContent = `The viewer cannot be started in this browser (${e.message}). The figures are complete without it.` })
