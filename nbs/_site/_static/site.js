// What scrolls sideways can be reached by keyboard
const reachable = () => document.querySelectorAll('.table-wrapper, .cell_output .output, div.highlight > pre, math[display=block]').forEach(e => {
  if (e.scrollWidth > e.clientWidth) { e.tabIndex = 0; if (e.localName !== 'math') { e.setAttribute('role', 'region'); e.setAttribute('aria-label', 'scrolls sideways') } }
})
addEventListener('load', reachable); addEventListener('resize', reachable)

// A folded cell is named by its own words
document.querySelectorAll('summary[aria-label]').forEach(e => e.removeAttribute('aria-label'))

// The slider between a CT and its masks
document.querySelectorAll('.compare input').forEach(e => e.addEventListener('input', () => e.parentElement.style.setProperty('--at', e.value + '%')))

// What a page is about, under its name in the results of a search
const results = document.getElementById('search-results')
if (results) fetch('_static/descriptions.json').then(r => r.json()).then(told => {
  const tell = () => results.querySelectorAll('li:not([data-told])').forEach(li => {
    li.dataset.told = ''
    const text = told[li.querySelector('a').getAttribute('href').split('.html')[0]]
    if (text) li.appendChild(document.createElement('p')).textContent = text
  })
  new MutationObserver(tell).observe(results, { childList: true, subtree: true }); tell()
})
