// What is shown, and what changes it.
const start = D.scores.findIndex((one) => one.name === D.masks[0].score);
const state = { a: 0, b: IDLE, score: D.scores.length ? Math.max(0, start) : -1, sort: 'affected', only: 'all', query: '', page: 0 };

function drawLegend() {
  const one = D.scores[state.score];
  byId('legend').textContent = one
    ? `colour: ${one.label} (${one.about}), ${one.signed ? 'blue above 0, orange below' : 'the stronger the higher among all tokens'}.`
    : 'no scores are there to colour by.';
}

function drawAll() {
  hideTip();
  drawLegend();
  drawRows(state);
  drawCharts(state);
  drawTables(state);
}

function changes(id, key, read, draw) {
  byId(id).addEventListener(id === 'query' ? 'input' : 'change', (event) => {
    state[key] = read(event.target.value);
    state.page = 0;
    draw();
  });
}

// A mask brings its own score to colour by.
function chooseMask(value) {
  const own = D.scores.findIndex((one) => one.name === D.masks[Number(value)].score);
  if (own >= 0) byId('score').value = String((state.score = own));
  return Number(value);
}

function drawHere() {
  const missing = D.total - D.rows.length;
  byId('here').textContent = missing > 0
    ? `${whole(D.rows.length)} of ${whole(D.total)} rows are here; ${whole(missing)} are not shown. Sorting and searching go over those that are here; \`alphatoken inspect\` shows any row.`
    : `All ${whole(D.total)} rows are here.`;
  byId('choices').replaceChildren(...D.choices.filter((one) => one.of).map((one) => el('li', {}, `${whole(one.here)} of ${whole(one.of)} that ${one.title}`)));
}

const masks = D.masks.map((mask, i) => [String(i), mask.name]);
options(byId('mask-a'), masks, '0');
options(byId('mask-b'), [['-1', 'no other'], ...masks], '-1');
options(byId('score'), D.scores.map((score, i) => [String(i), score.label]), String(state.score));
options(byId('sort'), Object.entries(ORDERS).map(([key, [text]]) => [key, text]), state.sort);
options(byId('only'), Object.entries(FILTERS).map(([key, [text]]) => [key, text]), state.only);
changes('mask-a', 'a', chooseMask, drawAll);
changes('mask-b', 'b', Number, drawAll);
changes('score', 'score', Number, () => (drawLegend(), drawRows(state)));
changes('sort', 'sort', String, () => drawRows(state));
changes('only', 'only', String, () => drawRows(state));
changes('query', 'query', String, () => drawRows(state));
const turn = (by) => () => {
  state.page += by;
  drawRows(state);
  byId('h-rows').scrollIntoView();
};
byId('before').addEventListener('click', turn(-1));
byId('after').addEventListener('click', turn(1));
addEventListener('scroll', () => document.activeElement?.dataset?.i || hideTip(), { passive: true });
drawHere();
drawAll();
byId('app').hidden = false;
