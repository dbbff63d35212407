// The list of rows: which are shown, in which order, some at a time.
const ROWS_AT_ONCE = 12;

const keptShare = (row, mask) => {
  const sums = row.b.reduce(([kept, of], one) => [kept + one.kept[mask], of + one.of], [0, 0]);
  return sums[1] ? sums[0] / sums[1] : 1;
};
const lengthOf = (row) => row.b.reduce((sum, one) => sum + one.of, 0);

function changed(row, a, b) {
  if (b < 0) return 0;
  return row.b.reduce((sum, one) => {
    const own = opened(one);
    return sum + own.kept[a].filter((kept, i) => kept !== own.kept[b][i]).length;
  }, 0);
}

function meanScore(row, score) {
  const all = row.b.flatMap((one) => opened(one).scores[score]);
  return all.length ? all.reduce((sum, one) => sum + one, 0) / all.length : -Infinity;
}

const ORDERS = {
  affected: ['most affected: nothing kept by value first', (r, s) => (r.only[s.a] ? 2 : 0) + 1 - keptShare(r, s.a)],
  dropped: ['largest share dropped', (r, s) => 1 - keptShare(r, s.a)],
  kept: ['largest share kept', (r, s) => keptShare(r, s.a)],
  changed: ['decided most differently by the second mask', (r, s) => changed(r, s.a, s.b)],
  score: ['highest mean of the colouring score', (r, s) => (s.score < 0 ? 0 : meanScore(r, s.score))],
  longest: ['longest response', (r) => lengthOf(r)],
  order: ['order of the data', (r) => -r.n],
};

const FILTERS = {
  all: ['all rows here', () => true],
  only: ['rows that keep only always-kept tokens', (r, s) => r.only[s.a]],
  changed: ['rows that the second mask decides otherwise', (r, s) => changed(r, s.a, s.b) > 0],
  random: ['rows drawn at random', (r) => r.why.some((one) => D.choices[one].kind === 'random')],
};

function textOf(row) {
  row.text ??= [row.id, row.from, ...row.b.map((one) => opened(one).texts.join('').replaceAll('⏎\n', ' '))].join('\n').toLowerCase();
  return row.text;
}

function found(state) {
  const query = state.query.trim().toLowerCase();
  const rows = D.rows.filter((row) => FILTERS[state.only][1](row, state) && (!query || textOf(row).includes(query)));
  const keyed = rows.map((row) => [ORDERS[state.sort][1](row, state), row]);
  return keyed.sort((x, y) => y[0] - x[0] || x[1].n - y[1].n).map(([, row]) => row);
}

function side(row, index, mask, other, state) {
  const branch = row.b[index];
  const name = [D.branches[index], D.masks[mask].name].filter(Boolean).join(', ');
  const kept = `${whole(branch.kept[mask])} of ${whole(branch.of)} response tokens kept`;
  return el('div', { class: 'side' }, el('p', { class: 'quiet' }, el('b', {}, name), ` ${kept}`), tokenBlock(row, index, mask, other, state));
}

function rowBlock(row, state) {
  const masks = state.b < 0 ? [state.a] : [state.a, state.b];
  const tags = masks.filter((mask) => row.only[mask]).map((mask) => el('span', { class: 'tag' }, `${D.masks[mask].name}: only always-kept tokens`));
  const sides = masks.flatMap((mask) => row.b.map((_, index) => side(row, index, mask, masks.find((one) => one !== mask) ?? IDLE, state)));
  return el(
    'article', { class: 'row' },
    el('h3', {}, row.id, ' ', el('span', { class: 'quiet' }, `row ${whole(row.n)}${row.from === row.id ? '' : `, ${row.from}`}`), ' ', ...tags),
    el('div', { class: 'sides' }, sides),
  );
}

function drawRows(state) {
  const rows = found(state);
  const pages = Math.max(1, Math.ceil(rows.length / ROWS_AT_ONCE));
  state.page = Math.min(state.page, pages - 1);
  const first = state.page * ROWS_AT_ONCE;
  const shown = rows.slice(first, first + ROWS_AT_ONCE);
  byId('rows').replaceChildren(...shown.map((row) => rowBlock(row, state)));
  byId('found').textContent = rows.length
    ? `${whole(rows.length)} of the ${whole(D.rows.length)} rows here; rows ${first + 1} to ${first + shown.length}.`
    : `None of the ${whole(D.rows.length)} rows here.`;
  byId('page').textContent = `page ${state.page + 1} of ${pages}`;
  byId('before').disabled = state.page === 0;
  byId('after').disabled = state.page === pages - 1;
}
