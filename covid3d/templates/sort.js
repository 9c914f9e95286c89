'use strict'
// Sort a table by the column whose head is pressed
for (const table of document.querySelectorAll('table.sort')) {
  const body = table.tBodies[0]
  for (const b of table.querySelectorAll('th button')) b.addEventListener('click', () => {
    const th = b.closest('th'), i = th.cellIndex, down = th.getAttribute('aria-sort') !== 'descending'
    const key = tr => { const t = tr.cells[i].dataset.value ?? tr.cells[i].textContent; return t === '' ? null : isNaN(t) ? t : +t }
    const order = (a, b) => a === b ? 0 : a === null ? 1 : b === null ? -1 :
      (typeof a === 'number' && typeof b === 'number' ? a-b : String(a).localeCompare(b))*(down ? -1 : 1)
    const rows = [...body.rows].map(tr => [key(tr), tr]).sort((a, b) => order(a[0], b[0]))
    for (const [, tr] of rows) body.append(tr)
    for (const o of table.querySelectorAll('th')) o.removeAttribute('aria-sort')
    th.setAttribute('aria-sort', down ? 'descending' : 'ascending')
  })
}
