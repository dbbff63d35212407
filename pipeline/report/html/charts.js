// Charts of what was counted over all response tokens of a branch.
const WIDTH = 360;
const HEIGHT = 110;

function histogram(name, chart, state) {
  const score = D.scores.find((one) => one.name === name);
  const most = Math.max(1, ...chart.count);
  const step = WIDTH / chart.count.length;
  const tall = (n) => HEIGHT * Math.sqrt(n / most);
  const bars = chart.count.map((count, i) => {
    const kept = chart.kept[state.a][i];
    const said = `${short(chart.edges[i])} to ${short(chart.edges[i + 1])}: ${whole(count)} tokens, ${whole(kept)} kept`;
    const bar = (n, kind) => svg('rect', { class: kind, x: (i * step).toFixed(1), y: (HEIGHT - tall(n)).toFixed(1), width: (step * 0.9).toFixed(1), height: tall(n).toFixed(1) });
    return count ? svg('g', {}, svg('title', {}, said), bar(count, 'all'), bar(kept, 'kept-a')) : null;
  });
  const line = state.b < 0 ? null : svg('polyline', {
    class: 'kept-b',
    points: chart.kept[state.b].map((n, i) => `${(i * step).toFixed(1)},${(HEIGHT - tall(n)).toFixed(1)} ${((i + 1) * step).toFixed(1)},${(HEIGHT - tall(n)).toFixed(1)}`).join(' '),
  });
  const low = chart.edges[0];
  const high = chart.edges.at(-1);
  const zero = low < 0 && high > 0 ? (WIDTH * -low) / (high - low) : null;
  const label = (x, anchor, text) => svg('text', { x, y: HEIGHT + 15, 'text-anchor': anchor }, text);
  const middle = chart.edges[chart.edges.length >> 1];
  const axis = [label(0, 'start', short(low)), label(WIDTH, 'end', short(high))];
  const room = (text) => 12 + 6.5 * text.length; // a label at an end, with the space after it
  if (zero === null) axis.push(label(WIDTH / 2, 'middle', short(middle)));
  else if (zero > room(short(low)) && zero < WIDTH - room(short(high))) axis.push(label(zero, 'middle', '0'));
  const total = chart.count.reduce((sum, n) => sum + n, 0);
  const log = chart.log ? '; logarithmic axis' : '';
  return el(
    'figure', {},
    svg(
      'svg', { viewBox: `-4 -4 ${WIDTH + 8} ${HEIGHT + 24}`, role: 'img', 'aria-label': `Histogram of ${score.label}: ${whole(total)} tokens from ${short(low)} to ${short(high)}` },
      ...bars, line,
      svg('line', { class: 'axis-line', x1: 0, x2: WIDTH, y1: HEIGHT, y2: HEIGHT }),
      zero === null ? null : svg('line', { class: 'zero', x1: zero, x2: zero, y1: 0, y2: HEIGHT }),
      ...axis,
    ),
    el('figcaption', {}, el('b', {}, score.label), `: ${score.about}${log}`),
  );
}

// Groups of tokens with the share that each mask keeps.
function groups(title, about, head, chart, state) {
  const masks = state.b < 0 ? [state.a] : [state.a, state.b];
  const heads = [{ text: head }, { text: 'tokens', number: 1 }, ...masks.map((mask) => ({ text: `kept by ${D.masks[mask].name}` }))];
  const rows = chart.names.map((name, i) => [
    name, whole(chart.count[i]),
    ...masks.map((mask, place) => {
      const kept = chart.kept[mask][i] / Math.max(1, chart.count[i]);
      return el('span', {}, share(kept, place > 0), ` ${percent(kept)}`);
    }),
  ]);
  return el('figure', {}, el('h3', {}, title), el('div', { class: 'wide', tabindex: 0, role: 'region', 'aria-label': title }, table(heads, rows)), about ? el('figcaption', {}, about) : null);
}

function drawCharts(state) {
  const parts = D.charts.map((chart, index) => {
    const flat = chart.flat.length ? `The same for all tokens, so not drawn: ${chart.flat.join(', ')}.` : null;
    const second = state.b < 0 ? '' : `; line: kept by ${D.masks[state.b].name}`;
    return [
      D.branches[index] ? el('h3', {}, D.branches[index]) : null,
      el('p', { class: 'quiet' }, `Grey: all response tokens; filled: kept by ${D.masks[state.a].name}${second}. Heights grow with the root of the count; what lies beyond an end is counted in the bar there.`),
      el('div', { class: 'charts' }, Object.entries(chart.histograms).map(([name, one]) => histogram(name, one, state))),
      flat ? el('p', { class: 'quiet' }, flat) : null,
      el(
        'div', { class: 'charts' },
        groups('By position in the response', 'Counted from 1 at the first response token.', 'position', chart.positions, state),
        chart.deciles ? groups('By loss', 'Tenths of the tokens by their loss, in nats; fewer groups where many have the same.', 'loss', chart.deciles, state) : null,
        groups('By source', null, 'file', chart.sources, state),
      ),
      strings(chart.strings[state.a], D.masks[state.a]),
      state.b < 0 || state.b === state.a ? null : strings(chart.strings[state.b], D.masks[state.b]),
      correlations(chart),
    ];
  });
  byId('charts').replaceChildren(...parts.flat().filter(Boolean));
}
