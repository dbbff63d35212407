// The data of the page, and how it is read: flags are bits, scores are half floats with a scale of their own per row.
const D = JSON.parse(document.getElementById('data').textContent);
const IDLE = -1; // no second mask

function bytes(text) {
  const raw = atob(text);
  return Uint8Array.from(raw, (character) => character.charCodeAt(0));
}

function flags(text, count) {
  const packed = bytes(text);
  return Array.from({ length: count }, (_, i) => (packed[i >> 3] >> (7 - (i & 7))) & 1);
}

function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
}

function floats([scale, text]) {
  const raw = bytes(text);
  return Array.from({ length: raw.length / 2 }, (_, i) => scale * half(raw[2 * i] | (raw[2 * i + 1] << 8)));
}

// A branch of a row, decoded once: tokens with their text, place among the response tokens (-1: prompt), kept per mask.
function opened(branch) {
  if (!branch.open) {
    const response = flags(branch.r, branch.t.length);
    let place = 0;
    const places = response.map((inside) => (inside ? place++ : -1));
    branch.open = {
      places,
      texts: branch.t.map((id, i) => branch.o[i] ?? D.tokens[id]),
      kept: branch.k.map((own) => flags(own, place)),
      scores: branch.s.map(floats),
      since: sinceStart(response),
      turn: turnLengths(response),
    };
  }
  return branch.open;
}

// How many response tokens of the same turn stand before each.
function sinceStart(response) {
  let run = 0;
  return response.map((inside) => (inside ? run++ : (run = 0)));
}

// How many tokens the response of each token has.
function turnLengths(response) {
  const lengths = response.map(() => 0);
  for (let start = 0; start < response.length; start++) {
    let stop = start;
    while (response[stop]) stop++;
    lengths.fill(stop - start, start, stop);
    start = Math.max(start, stop);
  }
  return lengths;
}

// The share of all tokens of the run that have a lower score, 0 to 1.
function rank(score, branch, value) {
  const q = D.scores[score].q[branch];
  let low = 0;
  let high = q.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (q[middle] < value) low = middle + 1;
    else high = middle;
  }
  return Math.min(1, low / (q.length - 1));
}

// -5 .. 5 for colours: of scores with a sign by size, of the others by rank.
function strength(score, branch, value) {
  const one = D.scores[score];
  if (!one.signed) return Math.min(5, Math.floor(rank(score, branch, value) * 6));
  const q = one.q[branch];
  const reach = Math.max(Math.abs(q[Math.round(q.length * 0.05)]), Math.abs(q[Math.round(q.length * 0.95) - 1])) || 1;
  return Math.sign(value) * Math.min(5, Math.round((Math.abs(value) / reach) * 5));
}

const short = (x) => (x === 0 ? '0' : String(Number(x.toPrecision(3))));
const percent = (x) => `${(100 * x).toFixed(1)}%`;
const whole = (n) => n.toLocaleString('en');
