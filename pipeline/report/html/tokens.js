// The tokens of a branch of a row under one mask, and what is said of the token under the pointer, finger or keys.
const tip = byId('tip');

function tokenBlock(row, index, mask, other, state) {
  const branch = row.b[index];
  const own = opened(branch);
  const name = [D.branches[index], D.masks[mask].name].filter(Boolean).join(', ');
  const block = el('div', { class: 'tokens', role: 'group', 'aria-label': `tokens of ${row.id} under ${name}` });
  if (branch.before) block.append(el('span', { class: 'cut' }, `${whole(branch.before)} tokens before … `));
  own.texts.forEach((text, i) => {
    const place = own.places[i];
    if (place < 0) {
      block.append(el('span', { class: 'p' }, text));
      return;
    }
    const classes = [own.kept[mask][place] ? 'k' : 'm'];
    const level = state.score < 0 ? 0 : strength(state.score, index, own.scores[state.score][place]);
    if (level) classes.push((level > 0 ? 'u' : 'd') + Math.abs(level));
    if (other >= 0 && own.kept[mask][place] !== own.kept[other][place]) classes.push('other');
    const token = el('span', { class: classes.join(' '), tabindex: -1, 'data-i': i }, text);
    block.append(token);
  });
  if (branch.after) block.append(el('span', { class: 'cut' }, ` … ${whole(branch.after)} tokens after`));
  const first = block.querySelector('[data-i]');
  if (first) first.tabIndex = 0;
  const show = (token) => showTip(token, describe(row, index, Number(token.dataset.i), mask));
  block.addEventListener('pointerover', (event) => event.target.dataset.i && show(event.target));
  block.addEventListener('pointerout', (event) => event.pointerType === 'mouse' && hideTip(block));
  block.addEventListener('focusin', (event) => event.target.dataset.i && rove(block, event.target, show));
  block.addEventListener('focusout', () => hideTip());
  block.addEventListener('keydown', (event) => walk(block, event));
  return block;
}

// One token of a block is reached by Tab, the one that was reached last.
function rove(block, token, show) {
  for (const before of block.querySelectorAll('[tabindex="0"]')) before.tabIndex = -1;
  token.tabIndex = 0;
  show(token);
}

function walk(block, event) {
  if (event.key === 'Escape') return hideTip();
  const tokens = [...block.querySelectorAll('[data-i]')];
  const at = tokens.indexOf(document.activeElement);
  const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: tokens.length - 1 };
  const next = tokens[to[event.key]];
  if (!next) return undefined;
  event.preventDefault();
  return next.focus();
}

function describe(row, index, i, mask) {
  const branch = row.b[index];
  const own = opened(branch);
  const place = own.places[i];
  const lines = [el('div', {}, el('code', {}, own.texts[i]), ` token id ${branch.t[i]}, number ${place + 1} of ${whole(branch.of)}`)];
  const names = (kept) => D.masks.filter((_, m) => own.kept[m][place] === kept).map((one) => one.name).join(', ');
  if (names(1)) lines.push(el('div', {}, `kept by: ${names(1)}`));
  if (names(0)) lines.push(el('div', {}, `dropped by: ${names(0)}`));
  lines.push(el('div', {}, why(branch, index, i, mask)));
  const shown = own.places.filter((one) => one >= 0).length;
  const rows = D.scores.map((score, s) => {
    const value = own.scores[s][place];
    const above = own.scores[s].filter((one) => one > value).length;
    return [score.label, short(value), `${above + 1} of ${shown}`, percent(rank(s, index, value))];
  });
  const heads = [{ text: 'score' }, { text: 'value', number: 1 }, { text: 'rank here', number: 1 }, { text: 'higher than, of all', number: 1 }];
  if (rows.length) lines.push(table(heads, rows));
  return lines;
}

// Why the token is kept or dropped, as far as its value and the threshold tell.
function why(branch, index, i, mask) {
  const own = opened(branch);
  const place = own.places[i];
  const { name, score, settings, always, branches } = D.masks[mask];
  const kept = own.kept[mask][place];
  const one = branches[index];
  const says = `${name}: ${kept ? 'kept' : 'dropped'}`;
  const s = D.scores.findIndex((found) => found.name === score);
  if (s < 0) return settings.score === 'random' ? `${says}, drawn at random` : says;
  const threshold = branch.th[mask] ?? one.threshold;
  if (threshold === null) {
    const range = one.thresholds ? ` (${short(one.thresholds.min)} to ${short(one.thresholds.max)})` : '';
    const per = { batch: 'of its batch', token_id: 'of its token id' }[settings.scope];
    return `${says}; the threshold is that ${per ?? 'of its group'}${range}`;
  }
  const value = own.scores[s][place];
  const above = value >= threshold * (1 - Math.sign(threshold) * 1e-3);
  const against = `${D.scores[s].label} ${short(value)}, threshold${branch.th[mask] === null ? '' : settings.scope === 'batch' ? ' of its batch' : ' of its row'} ${short(threshold)}`;
  const skipped = own.turn[i] >= (settings.skip_first_from ?? 1) ? (settings.skip_first ?? 0) : 0;
  if (!kept && own.since[i] < skipped) return `${says}: mask.skip_first leaves it out (${against})`;
  if (kept && always.includes(branch.t[i])) return `${says}: one of mask.always_keep (${against})`;
  if (kept && !above) return `${says}: by mask.min_kept (${against})`;
  if (!kept && above && settings.least_stable) return `${says}: mask.least_stable leaves it out (${against})`;
  return `${says}: ${against}`;
}

function showTip(token, lines) {
  tip.replaceChildren(...lines);
  tip.hidden = false;
  for (const before of document.querySelectorAll('[aria-describedby="tip"]')) before.removeAttribute('aria-describedby');
  token.setAttribute('aria-describedby', 'tip');
  if (matchMedia('(max-width: 40rem)').matches) {
    tip.style.removeProperty('left');
    tip.style.removeProperty('top');
    if (token.getBoundingClientRect().bottom > tip.getBoundingClientRect().top) token.scrollIntoView({ block: 'nearest' });
    return;
  }
  const at = token.getBoundingClientRect();
  const size = tip.getBoundingClientRect();
  const below = at.bottom + 6 + size.height < innerHeight;
  tip.style.left = `${Math.max(8, Math.min(at.left, innerWidth - size.width - 8))}px`;
  tip.style.top = `${below ? at.bottom + 6 : Math.max(8, at.top - size.height - 6)}px`;
}

function hideTip(block) {
  if (block && block.contains(document.activeElement)) return;
  tip.hidden = true;
}
