// @grafana/ui imports this package's default as Node would not give it: hand over the component itself.
module.exports = require('./node_modules/react-custom-scrollbars-2/lib/index.js').default;
