// Elements, whose text is always text: nothing in this page is made from HTML in strings.
function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) node.setAttribute(name, '');
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

const el = (name, attributes = {}, ...children) => fill(document.createElement(name), attributes, children);
const svg = (name, attributes = {}, ...children) =>
  fill(document.createElementNS('http://www.w3.org/2000/svg', name), attributes, children);
const byId = (id) => document.getElementById(id);

function options(select, entries, chosen) {
  select.replaceChildren(...entries.map(([value, text]) => el('option', { value, selected: value === chosen }, text)));
}

function table(heads, rows, attributes = {}) {
  const cell = (kind, scope) => (text, i) =>
    el(i ? kind : 'th', { class: heads[i].number ? 'n' : null, scope: i ? scope : scope || 'row' }, text);
  return el(
    'table', attributes,
    el('thead', {}, el('tr', {}, heads.map((head) => el('th', { scope: 'col', class: head.number ? 'n' : null }, head.text)))),
    el('tbody', {}, rows.map((row) => el('tr', {}, row.map(cell('td', null))))),
  );
}

function share(value, other) {
  const bar = el('i');
  bar.style.width = percent(value);
  return el('span', { class: other ? 'share of-b' : 'share', 'aria-hidden': 'true' }, bar);
}
