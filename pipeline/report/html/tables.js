// Tables: strings most kept and most dropped, correlations of scores, agreement of masks, settings.
function strings(found, mask) {
  const heads = [{ text: 'token' }, { text: 'occurs', number: 1 }, { text: 'kept', number: 1 }, { text: 'share', number: 1 }];
  const part = (title, rows) =>
    el(
      'figure', { class: 'strings' }, el('h3', {}, title),
      rows.length
        ? table(heads, rows.map(([text, total, kept]) => [el('code', {}, text), whole(total), whole(kept), percent(kept / total)]))
        : el('p', { class: 'quiet' }, 'None: every token is kept as often as all together.'),
    );
  return el('div', { class: 'charts' }, part(`Strings that ${mask.name} keeps most`, found.most), part(`Strings that ${mask.name} drops most`, found.least));
}

function correlations(chart) {
  if (!chart.correlations.length) return null;
  const names = [...new Set(chart.correlations.flatMap(([a, b]) => [a, b]))];
  const value = new Map(chart.correlations.flatMap(([a, b, r]) => [[`${a}\n${b}`, r], [`${b}\n${a}`, r]]));
  const heads = [{ text: '' }, ...names.map((name) => ({ text: name, number: 1 }))];
  const rows = names.map((a) => [a, ...names.map((b) => (a === b ? '1' : value.get(`${a}\n${b}`).toFixed(2)))]);
  const of = chart.whole ? `all ${whole(chart.sampled)} response tokens` : `${whole(chart.sampled)} response tokens at equal distances; so do ranks over all and the borders of groups`;
  return el(
    'figure', {}, el('h3', {}, 'Rank correlations of scores'),
    el('div', { class: 'wide', tabindex: 0, role: 'region', 'aria-label': 'Rank correlations of scores' }, table(heads, rows)),
    el('figcaption', {}, `Spearman's; from ${of}.`),
  );
}

function drawTables(state) {
  for (const name of document.querySelectorAll('.agree')) name.textContent = D.masks[state.a].name;
  for (const cell of document.querySelectorAll('#masks [data-mask]')) {
    cell.textContent = D.charts[cell.dataset.branch].agreement[state.a][cell.dataset.mask].toFixed(3);
  }
  byId('mask-settings').textContent = JSON.stringify(D.masks[state.a].settings, null, 2);
}
