// Draws `window.PAGE` (made by kvboards.look) with Grafana's own theme, panel frames, time series, big values, bar
// gauges, tables, units, legends and field overrides. State timelines are drawn here: Grafana keeps those inside its
// server. What looks wrong here looks wrong there.
import React from 'react';
import { createRoot } from 'react-dom/client';
import {
  applyFieldOverrides,
  createTheme,
  dateTime,
  FieldConfigOptionsRegistry,
  FieldType,
  getDisplayProcessor,
  getDisplayValueAlignmentFactors,
  ThemeContext,
  toDataFrame,
} from '@grafana/data';
import { initPluginTranslations } from '@grafana/i18n';
import { BarGauge, BigValue, GlobalStyles, PanelChrome, Table, TimeSeries } from '@grafana/ui';

const page = window.PAGE;
const theme = createTheme({ colors: { mode: 'dark' } });
const COLUMN = page.width / 24;
const ROW = 38;
const GAP = 8;
const TITLE = 40;

const standard = ['unit', 'min', 'max', 'decimals', 'noValue', 'color', 'thresholds', 'mappings', 'displayName'];
const custom = [
  'lineWidth', 'fillOpacity', 'lineStyle', 'stacking', 'drawStyle', 'axisPlacement', 'fillBelowTo', 'showPoints',
  'spanNulls', 'lineInterpolation', 'scaleDistribution', 'thresholdsStyle', 'axisLabel', 'gradientMode', 'hideFrom',
  'axisColorMode', 'axisCenteredZero', 'axisSoftMax', 'axisSoftMin', 'minWidth', 'barAlignment', 'pointSize', 'axisGridShow', 'axisBorderShow',
];
const registry = new FieldConfigOptionsRegistry();
const option = (id, path, isCustom) => ({
  id, path, isCustom, name: id, editor: () => null, override: () => null,
  process: (value) => value, shouldApply: () => true, settings: {},
});
standard.forEach((id) => registry.register(option(id, id, false)));
custom.forEach((path) => registry.register(option(`custom.${path}`, path, true)));

const LOOKS = { drawStyle: 'line', lineInterpolation: 'linear', lineWidth: 1, fillOpacity: 0, showPoints: 'never',
  barAlignment: 0, pointSize: 4, axisPlacement: 'auto', axisColorMode: 'text', gradientMode: 'none',
  scaleDistribution: { type: 'linear' }, hideFrom: { legend: false, tooltip: false, viz: false },
  stacking: { mode: 'none', group: 'A' }, thresholdsStyle: { mode: 'off' } };

function styled(panel) {
  const frames = panel.frames.map((frame) =>
    toDataFrame({
      refId: frame.refId,
      name: frame.name,
      fields: [
        { name: 'Time', type: FieldType.time, values: frame.times, config: {} },
        { name: 'Value', type: FieldType.number, labels: frame.labels, values: frame.values,
          config: { displayNameFromDS: frame.name, custom: {} } },
      ],
    })
  );
  const defaults = { ...panel.json.fieldConfig.defaults };
  defaults.custom = { ...LOOKS, ...(defaults.custom || {}) };
  return applyFieldOverrides({
    data: frames,
    fieldConfig: { defaults, overrides: panel.json.fieldConfig.overrides || [] },
    fieldConfigRegistry: registry,
    replaceVariables: (text) => text,
    theme,
    timeZone: 'utc',
  });
}

function Lines({ panel, width, height }) {
  const frames = styled(panel);
  const range = { from: dateTime(page.from), to: dateTime(page.to), raw: { from: '', to: '' } };
  return (
    <TimeSeries frames={frames} width={width} height={height} timeRange={range} timeZone="utc" structureRev={1}
      legend={{ calcs: [], ...panel.json.options.legend }} options={{}} />
  );
}

function last(field) {
  const present = field.values.filter((value) => value !== null);
  return present.length ? present[present.length - 1] : null;
}

function Stat({ panel, width, height }) {
  const frames = styled(panel);
  const shown = frames.map((frame) => {
    const field = frame.fields[1];
    return { ...field.display(last(field)), title: frames.length > 1 ? frame.name : undefined };
  });
  return shown.map((value, index) => (
    <BigValue key={index} value={value} width={width / shown.length} height={height} theme={theme} colorMode="value"
      graphMode="none" justifyMode="auto" textMode={shown.length > 1 ? 'value_and_name' : 'value'} />
  ));
}

function Bars({ panel, width, height }) {
  const frames = styled(panel).filter((frame) => last(frame.fields[1]) !== null);
  const each = Math.min(34, height / Math.max(frames.length, 1));
  const most = Math.max(...frames.map((frame) => last(frame.fields[1])));
  const bars = frames.map((frame) => {
    const field = frame.fields[1];
    const config = { ...field.config };
    // Without a `max` Grafana scales bars by the largest value it shows.
    config.max ??= most || 1;
    const display = getDisplayProcessor({ field: { ...field, config }, theme });
    return { config, display, value: { ...display(last(field)), title: frame.name } };
  });
  const alike = getDisplayValueAlignmentFactors(bars.map((bar) => ({ display: bar.value })));
  return bars.map((bar, index) => (
    <div key={index} style={{ height: each + 6 }}>
      <BarGauge width={width} height={each} field={bar.config} value={bar.value} display={bar.display}
        orientation="horizontal" displayMode="basic" showUnfilled theme={theme} valueDisplayMode="text"
        itemSpacing={8} alignmentFactors={alike} />
    </div>
  ));
}

function Rows({ panel, width, height }) {
  // Joined and renamed by kvboards.look as the panel's transformations say; units by heading, as its overrides say.
  const fields = panel.table.map((column) => ({
    name: column.heading,
    type: column.numeric ? FieldType.number : FieldType.string,
    values: column.values,
    config: { custom: {} },
  }));
  const [frame] = applyFieldOverrides({
    data: [toDataFrame({ fields })],
    fieldConfig: { defaults: panel.json.fieldConfig.defaults, overrides: panel.json.fieldConfig.overrides || [] },
    fieldConfigRegistry: registry, replaceVariables: (text) => text, theme, timeZone: 'utc',
  });
  return <Table data={frame} width={width} height={height} />;
}

function States({ panel, width, height }) {
  const options = (panel.json.fieldConfig.defaults.mappings || [])[0]?.options || {};
  const names = Math.max(...panel.frames.map((frame) => frame.name.length)) * 7.4 + 14;
  const legend = 26;
  const each = (height - legend - 20) / panel.frames.length;
  const scale = (time) => names + ((time - page.from) / (page.to - page.from)) * (width - names);
  const spans = (frame) => {
    const found = [];
    frame.times.forEach((time, index) => {
      const value = frame.values[index];
      const open = found[found.length - 1];
      if (open && open.value === value) { open.to = time + page.step; }
      else if (value !== null) { found.push({ value, from: time, to: time + page.step }); }
    });
    return found;
  };
  const shares = width < 500 ? [0, 1] : [0, 0.25, 0.5, 0.75, 1];
  const ticks = shares.map((share) => page.from + share * (page.to - page.from));
  const text = { fill: theme.colors.text.secondary, fontSize: 12, fontFamily: theme.typography.fontFamily };
  return (
    <div>
      <svg width={width} height={height - legend}>
        {panel.frames.map((frame, row) => (
          <g key={row} transform={`translate(0, ${row * each})`}>
            <text {...text} x={names - 10} y={each / 2 + 4} textAnchor="end">{frame.name}</text>
            {spans(frame).map((span, index) => {
              const state = options[String(span.value)] || { text: String(span.value), color: '#888' };
              const wide = scale(span.to) - scale(span.from);
              return (
                <g key={index}>
                  <rect x={scale(span.from)} y={each * 0.08} width={Math.max(wide, 1)} height={each * 0.84}
                    fill={state.color} fillOpacity={0.85} />
                  {wide > state.text.length * 7 + 8 && each > 14 && (
                    <text {...text} x={scale(span.from) + 5} y={each / 2 + 4}
                      fill={theme.colors.getContrastText(state.color)}>{state.text}</text>
                  )}
                </g>
              );
            })}
          </g>
        ))}
        {ticks.map((time, index) => (
          <text key={index} {...text} x={scale(time)} y={height - legend - 4}
            textAnchor={index === 0 ? 'start' : index === ticks.length - 1 ? 'end' : 'middle'}>
            {new Date(time).toISOString().slice(11, 19)}
          </text>
        ))}
      </svg>
      <div style={{ display: 'flex', gap: 16, fontSize: 12, paddingTop: 4 }}>
        {Object.values(options).map((state) => (
          <span key={state.text}>
            <span style={{ display: 'inline-block', width: 14, height: 4, marginRight: 6, verticalAlign: 'middle',
              background: state.color }} />
            {state.text}
          </span>
        ))}
      </div>
    </div>
  );
}

const KINDS = { timeseries: Lines, stat: Stat, bargauge: Bars, table: Rows, 'state-timeline': States };

function Shown({ panel }) {
  const at = panel.at;
  const width = at.w * COLUMN - GAP;
  const height = at.h * ROW - GAP;
  const Kind = KINDS[panel.json.type];
  const empty = panel.frames.length === 0 && !panel.table;
  return (
    <div style={{ position: 'absolute', left: at.x * COLUMN + GAP / 2, top: at.y * ROW }}>
      <PanelChrome title={panel.title} width={width} height={height} padding="md">
        {(innerWidth, innerHeight) =>
          empty ? <div className="empty">{panel.json.fieldConfig.defaults.noValue || 'No data'}</div>
            : <Kind panel={panel} width={innerWidth} height={innerHeight} />}
      </PanelChrome>
    </div>
  );
}

function Page() {
  return (
    <ThemeContext.Provider value={theme}>
      <GlobalStyles />
      <div style={{ position: 'relative', width: page.width, height: page.rows * ROW + TITLE,
        background: theme.colors.background.canvas, color: theme.colors.text.primary,
        fontFamily: theme.typography.fontFamily, fontSize: 14 }}>
        <div style={{ padding: '10px 8px', height: TITLE, boxSizing: 'border-box', fontSize: 16 }}>
          {page.title}
          {page.choices.map(([label, value]) => (
            <span key={label} style={{ marginLeft: 18, fontSize: 12, color: theme.colors.text.secondary }}>
              {label} <b style={{ color: theme.colors.text.primary }}>{value}</b>
            </span>
          ))}
        </div>
        <div style={{ position: 'relative' }}>
          {page.headings.map((row) => (
            <div key={row.title} style={{ position: 'absolute', left: 8, top: row.y * ROW + 8, fontSize: 15 }}>
              ⌄ {row.title}
            </div>
          ))}
          {page.panels.map((panel) => <Shown key={panel.key} panel={panel} />)}
        </div>
      </div>
    </ThemeContext.Provider>
  );
}

initPluginTranslations('kvpilot').then(() => createRoot(document.getElementById('root')).render(<Page />));
